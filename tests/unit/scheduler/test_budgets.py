"""Budgets in plans: whose they are, what a refusal says, and what a charge comes to."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.codec import decode, encode
from fleet.model.budget import Balance, Budget, Charged, Meter, MeterEntry, Prices
from fleet.model.host import Capacity
from fleet.model.ids import HostId
from fleet.model.sandbox import Amounts, Goal, Limits, Phase, SandboxRecord, Stage, StageName, Totals
from scheduler.budget.accounts import chain_of, sandbox_account
from scheduler.budget.balance import BUDGET
from scheduler.budget.forecast import Readings, find_exhaustion, left_s
from scheduler.budget.journal import COUNTER_MAX, Books, charge, due_of
from scheduler.placement.snapshot import Snapshot
from tests.unit.scheduler.build import (
    DEMO,
    NOW_MS,
    assignment,
    host,
    planned,
    record,
    sandbox_id,
    snapshot,
    spec,
    status,
)

WIDE = host(capacity=Capacity(100, 100_000, 100_000, 100))
ONE = HostId("one")


def budget(account: str, parent: str = "", **limits: Any) -> Budget:
    return Budget(DEMO, account, parent, Limits(**limits), "operator", NOW_MS)


def budgets(*made: Budget) -> dict[Any, Budget]:
    return {(one.tenant, one.account): one for one in made}


def member(number: int, account: str = "", **changes: Any) -> SandboxRecord:
    return record(number, spec=spec(number, budget=account), **changes)


TEAM = budgets(budget("org"), budget("team", "org"))


def test_a_chain_leads_from_the_sandbox_to_its_tenant() -> None:
    """A child pays from its own limits, its ancestors', its oldest ancestor's account and those above that, in this order."""
    limits = Limits(Amounts(vcpus=4))
    top = record(1, spec=spec(1, budget="team", limits=limits))
    middle = record(2, spec=spec(2, parent=top.sandbox_id), ancestors=(top.sandbox_id,))
    child = record(
        3,
        spec=spec(3, parent=middle.sandbox_id, limits=limits),
        ancestors=(middle.sandbox_id, top.sandbox_id),
    )
    chain = chain_of(snapshot(records=[top, middle, child], budgets=TEAM), child)
    own, ancestor = sandbox_account(child.sandbox_id), sandbox_account(top.sandbox_id)
    assert chain.accounts == (own, ancestor, "team", "org", "")
    assert chain.below == (0, 2, 3, 3, 3)
    assert not chain.fault


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (Amounts(vcpus=1), "account org may use 1 of vcpus, uses 1, and this needs 1"),
        (Amounts(memory_mib=1023), "account org may use 1023 MiB of memory, uses 512, and this needs 512"),
        (Amounts(disk_mib=2047), "account org may use 2047 MiB of disk, uses 1024, and this needs 1024"),
        (Amounts(sandboxes=1), "account org may use 1 of sandboxes, uses 1, and this needs 1"),
    ],
)
def test_one_past_a_budget_is_refused_by_name(limit: Amounts, says: str) -> None:
    """Of two that fit on the host the second is refused for the account above its own, with limit, use, and what would help."""
    made = budgets(budget("org", concurrent=limit), budget("team", "org"))
    seen = snapshot(records=[member(1, "team"), member(2, "team")], hosts=[WIDE], budgets=made)
    plan = planned(seen)
    assert [one.accounts for one in plan.assignments] == [("team", "org", "")]
    ((reason,),) = [one.reasons for one in plan.refusals]
    assert reason.code == BUDGET
    assert reason.message.startswith(says)


def test_depth_counts_generations() -> None:
    """With a depth of one the tenant's sandboxes start none themselves."""
    top = member(1)
    child = record(2, spec=spec(2, parent=top.sandbox_id), ancestors=(top.sandbox_id,))
    made = budgets(budget("", concurrent=Amounts(depth=1)))
    plan = planned(snapshot(records=[top, child], hosts=[WIDE], budgets=made))
    assert [one.sandbox_id for one in plan.assignments] == [top.sandbox_id]
    assert "depth" in plan.refusals[0].reasons[0].message


def test_what_is_gone_above_a_sandbox_does_not_free_it() -> None:
    """Neither a removed account nor a destroyed parent widens what is below it: nothing more is placed there."""
    orphan = member(1, "nobody")
    top = member(2, goal=Goal.REMOVE)
    child = record(3, spec=spec(3, parent=top.sandbox_id), ancestors=(top.sandbox_id,))
    plan = planned(snapshot(records=[orphan, top, child], hosts=[WIDE]))
    assert not plan.assignments
    assert {one.reasons[0].code for one in plan.refusals} == {BUDGET}


def test_a_further_run_has_its_share_already() -> None:
    """A stopped sandbox holds its disk and its place: for its next run the budget must have room for the rest only."""
    made = budgets(budget("", concurrent=Amounts(vcpus=1, disk_mib=1024, sandboxes=1)))
    wish = member(1, generation=3, run=2)
    order = assignment(member(1), WIDE, goal=Goal.STOP)
    said = status(order, Phase.STOPPED, released=True)
    plan = planned(snapshot(records=[wish], assignments=[order], statuses=[said], hosts=[WIDE], budgets=made))
    assert [one.run for one in plan.assignments] == [2]


def metered(seen: Snapshot, used: Totals, period: int, charged: Charged | None = None) -> Snapshot:
    entry = MeterEntry(sandbox_id(1), DEMO, 1, used, ("team", "org", ""))
    meters = {ONE: Meter(ONE, period, NOW_MS, (entry,))}
    return replace(seen, meters=meters, charged={ONE: charged} if charged is not None else {})


def test_a_meter_is_charged_once_to_all_accounts() -> None:
    """What was charged before is not charged again, a meter seen twice owes nothing, one that went back owes nothing."""
    base = snapshot(records=[member(1, "team")], hosts=[WIDE], budgets=TEAM, prices=Prices(vcpu_hour_micro=3_600_000))
    first = metered(base, Totals(wall_ms=1000, vcpu_ms=1000), 1)
    (posting,) = charge(first, Books(first), ONE)
    assert {one.account: one.spent for one in posting.balances} == dict.fromkeys(
        ("team", "org", ""), Totals(1000, 1000, 0, 0, 1000)
    )
    (again,) = charge(metered(base, Totals(1000, 1000), 2, posting.charged), Books(base), ONE)
    assert not again.balances
    (back,) = charge(metered(base, Totals(10, 10), 3, again.charged), Books(base), ONE)
    assert not back.balances
    (further,) = charge(metered(base, Totals(1500, 1500), 4, back.charged), Books(base), ONE)
    assert {one.spent.wall_ms for one in further.balances} == {500}


def test_a_meter_that_lies_is_charged_what_can_be_written() -> None:
    """Counters up to the wire's end, of several sandboxes: the balance can be written and read, and is not charged again."""
    most = Totals(2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1)
    entries = tuple(MeterEntry(sandbox_id(number), DEMO, 1, most, ("",)) for number in (1, 2))
    base = snapshot(hosts=[WIDE], prices=Prices(vcpu_hour_micro=2**63 - 1))
    seen = replace(base, meters={ONE: Meter(ONE, 1, NOW_MS, entries)})
    (posting,) = charge(seen, Books(seen), ONE)
    (balance,) = posting.balances
    assert decode(Balance, encode(balance)).spent == Totals(*[COUNTER_MAX] * 5)
    assert decode(Charged, encode(posting.charged)) == posting.charged
    (again,) = charge(replace(seen, charged={ONE: posting.charged}), Books(seen), ONE)
    assert not again.balances


def test_rounding_loses_nothing() -> None:
    """A thousand charges of a millisecond cost what one of a second costs."""
    prices = Prices(vcpu_hour_micro=1_234_567)
    charged = Totals()
    for number in range(1, 1001):
        due = due_of(Totals(number, number), charged, prices)
        charged = Totals(number, number, 0, 0, charged.cost_micro + due.cost_micro)
    assert charged.cost_micro == due_of(Totals(1000, 1000), Totals(), prices).cost_micro


def test_what_runs_is_estimated_between_meters() -> None:
    """Ten seconds after a meter of fifty, a limit of a minute is used up; a moment before it is not, and it says in how long."""
    wish = record(1, spec=spec(1, limits=Limits(total=Totals(wall_ms=60_000))))
    account = (DEMO, sandbox_account(wish.sandbox_id))
    order = assignment(wish, WIDE, accounts=(account[1], ""))
    said = status(order, stages=(Stage(StageName.DOMAIN_STARTED, NOW_MS - 50_000),))
    entry = MeterEntry(wish.sandbox_id, DEMO, 1, Totals(50_000, 50_000), order.accounts)
    seen = snapshot(
        records=[wish],
        assignments=[order],
        statuses=[said],
        hosts=[WIDE],
        meters={ONE: Meter(ONE, 4, NOW_MS, (entry,))},
        balances={account: Balance(*account, Amounts(), Totals(0, 0))},
    )
    assert find_exhaustion(seen, Readings(seen), account, NOW_MS + 9_999) is None
    found = find_exhaustion(seen, Readings(seen), account, NOW_MS + 10_000)
    assert found is not None
    assert (found.name, found.limit, found.used) == ("wall_ms", 60_000, 60_000)
    assert left_s(wish.spec.limits.total, Readings(seen).use_of(account, NOW_MS + 5_000)) == {"wall_ms": 5.0}
