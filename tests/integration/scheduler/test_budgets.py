"""Budgets on a store: the balance is the fence of a placement, meters are charged, and what is used up is stopped."""

from dataclasses import replace

from fleet.codec import decode, encode
from fleet.model.budget import Balance, Budget, Meter, MeterEntry, Prices
from fleet.model.ids import HostId
from fleet.model.sandbox import Amounts, Goal, Limits, SandboxRecord, Totals
from fleet.store.keyspace import PRICES, balance_key, budget_key, meter_key, record_key
from fleet.store.port import Put, Store, Unmoved
from scheduler.budget.accounts import sandbox_account
from scheduler.commit import Committer, plan_changes
from tests.integration.scheduler.parts import HANG_S, Decider
from tests.integration.scheduler.test_cycle import assignments_in, look, put_all
from tests.unit.scheduler.build import (
    DEMO,
    NOW_MS,
    assignment,
    host,
    host_puts,
    planned,
    record,
    record_puts,
    spec,
    status,
    status_put,
)

TEAM = Budget(DEMO, "team", "", Limits(Amounts(sandboxes=1)), "me", NOW_MS)
ONE = HostId("one")


async def balance_of(store: Store, account: str) -> Balance | None:
    found = await store.get(balance_key(DEMO, account))
    return decode(Balance, found.value) if found is not None else None


async def test_two_plans_do_not_share_what_is_left(store: Store, decider: Decider, fence: Unmoved) -> None:
    """Two plans on one snapshot place two sandboxes on two hosts, and the account has room for one: one commits."""
    wishes = [record(number, spec=spec(number, budget="team")) for number in range(2)]
    writes = [*host_puts(host("one")), *host_puts(host("two")), *(put for wish in wishes for put in record_puts(wish))]
    await decider.mirror.wait_for(await put_all(store, [*writes, Put(budget_key(DEMO, "team"), encode(TEAM))]), HANG_S)
    seen = decider.state.snapshot()
    views = [
        replace(seen, records={wish.sandbox_id: wish}, alive=frozenset([HostId(name)]), kept=None)
        for wish, name in zip(wishes, ("one", "two"), strict=True)
    ]
    plans = [list(plan_changes(view, planned(view))) for view in views]
    committer = Committer(store, lambda: 0.0)
    assert [(await committer.commit(fence, changes)).is_committed for changes in plans] == [True, False]
    assert [one.accounts for one in await assignments_in(store)] == [("team", "")]
    assert await balance_of(store, "team") == Balance(DEMO, "team", Amounts(1, 512, 1024, 0, 1))


async def test_what_is_metered_is_charged_and_what_is_used_up_is_stopped(store: Store, decider: Decider) -> None:
    """One look charges a meter to the whole chain with its price; the sandbox whose limit it meets is stopped, and says why."""
    limits = Limits(total=Totals(wall_ms=60_000))
    wish = record(0, spec=spec(0, limits=limits))
    account = sandbox_account(wish.sandbox_id)
    await look(decider, await put_all(store, [*host_puts(host()), *record_puts(wish)]))
    (order,) = await assignments_in(store)
    assert order.accounts == (account, "")
    entry = MeterEntry(wish.sandbox_id, DEMO, 1, Totals(60_000, 60_000), order.accounts)
    prices = Put(PRICES, encode(Prices(vcpu_hour_micro=3_600_000)))
    meter = Put(meter_key(ONE), encode(Meter(ONE, 1, NOW_MS, (entry,))))
    said = status_put(status(assignment(wish, host())))
    # The limit is looked at again once some time has passed.
    decider.now_ms += 5_000
    await look(decider, await put_all(store, [prices, meter, said]))
    spent = Totals(60_000, 60_000, 0, 0, 60_000)
    for name in (account, ""):
        balance = await balance_of(store, name)
        assert balance is not None
        assert (balance.spent, balance.reserved.sandboxes) == (spent, 1)
    found = await store.get(record_key(DEMO, wish.sandbox_id))
    assert found is not None
    after = decode(SandboxRecord, found.value)
    assert (after.goal, after.generation) == (Goal.STOP, 2)
    assert after.reason is not None
    assert after.reason.code == "budget_exhausted"
    assert "wall_clock" in after.reason.message
    (ordered,) = await assignments_in(store)
    assert (ordered.goal, ordered.reason) == (Goal.STOP, after.reason)


async def test_what_a_destroyed_sandbox_used_is_charged(store: Store, decider: Decider) -> None:
    """A last meter that comes when sandbox and order are gone is charged to the accounts above it."""
    entry = MeterEntry(
        record().sandbox_id, DEMO, 1, Totals(1000, 1000), (sandbox_account(record().sandbox_id), "team", "")
    )
    budget = Put(budget_key(DEMO, "team"), encode(TEAM))
    meter = Put(meter_key(ONE), encode(Meter(ONE, 7, NOW_MS, (entry,))))
    await look(decider, await put_all(store, [*host_puts(host()), budget, meter]))
    assert await balance_of(store, entry.accounts[0]) is None
    for account in ("team", ""):
        assert await balance_of(store, account) == Balance(DEMO, account, Amounts(), Totals(1000, 1000))
