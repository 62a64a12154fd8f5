"""Budgets under any interleaving: two schedulers, hosts, meters, and a store that breaks before or after any write."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from time import monotonic
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.codec import encode
from fleet.errors import UnavailableError
from fleet.model.budget import Balance, Budget, Meter, MeterEntry, Prices
from fleet.model.host import Capacity
from fleet.model.ids import HostId, SandboxId
from fleet.model.sandbox import Amounts, Goal, Limits, Phase, Resources, Stage, StageName, Totals
from fleet.store.keyspace import LEADER, PRICES, ROOT, budget_key, meter_key, status_key
from fleet.store.memory import MemoryStore
from fleet.store.port import Committed, Put, Store, Unmoved, Write
from scheduler.contents import snapshot_of
from scheduler.placement.snapshot import Snapshot, accounts_of, set_aside
from tests.integration.scheduler.parts import HANG_S, Decider, running
from tests.unit.scheduler.build import DEMO, NOW_MS, host, host_puts, record, record_puts, sandbox_id, spec, status

# A property of plans takes seconds of a processor.
pytestmark = pytest.mark.slow

HOSTS = [host(name, capacity=Capacity(64, 65_536, 65_536, 64)) for name in ("a", "b")]
PRICE = Prices(vcpu_hour_micro=3_600_000)
LIMITS = {"org": Amounts(vcpus=5, sandboxes=4), "team": Amounts(vcpus=3), "": Amounts(vcpus=6)}
PARENTS = {"org": "", "team": "org"}
# Looks in which all that is due must be written.
LOOKS_MAX = 20

# More than fits, some of which runs: so that what follows has something to break.
OPENING = (
    *(("create", number, account, 2) for number, account in enumerate(["team", "team", "org", "", "org"])),
    ("look", 1, 0, False),
    *(("run", number) for number in range(5)),
    ("meter", 1000),
)
numbers, deciders = st.integers(0, 7), st.integers(0, 1)
steps = st.one_of(
    st.tuples(st.just("create"), numbers, st.sampled_from(["", "org", "team"]), st.integers(1, 3)),
    st.tuples(st.just("look"), deciders, st.integers(0, 3), st.booleans()),
    st.tuples(st.just("look"), deciders, st.just(0), st.booleans()),
    st.tuples(st.just("lead"), deciders),
    st.tuples(st.just("run"), numbers),
    st.tuples(st.just("end"), numbers, st.sampled_from([Phase.COMPLETED, Phase.STOPPED])),
    st.tuples(st.just("remove"), numbers),
    st.tuples(st.just("meter"), st.integers(1, 5000)),
    st.just(("again",)),
    st.just(("forget",)),
)


class Breaking:
    """A store whose next transaction but so many breaks, before it is written or after."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.left = 0
        self.is_after = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def transact(self, conditions: Sequence[Unmoved], writes: Sequence[Write]) -> Committed:
        self.left -= 1
        breaks = self.left == 0
        if not breaks or self.is_after:
            made = await self._store.transact(conditions, writes)
            if not breaks:
                return made
        raise UnavailableError("store_unavailable", "it broke")


class World:
    """One history under way; `metered` is the most that was published of each placement."""

    def __init__(self) -> None:
        self.store = MemoryStore(monotonic)
        self.breaking = [Breaking(self.store), Breaking(self.store)]
        self.deciders: list[Decider] = []
        self.created: set[SandboxId] = set()
        self.revision = 0
        self.period: Counter[HostId] = Counter()
        self.counters: dict[tuple[HostId, SandboxId], Totals] = {}
        self.metered: dict[tuple[HostId, SandboxId], MeterEntry] = {}
        # What each placement has run in truth, also what its host has forgotten.
        self.elapsed_ms: Counter[tuple[HostId, SandboxId]] = Counter()
        self.has_gone_back = False

    async def put(self, *writes: Write) -> None:
        self.revision = (await self.store.transact([], writes)).revision

    async def seen(self) -> Snapshot:
        listing = await self.store.list_prefix(ROOT)
        return snapshot_of(listing.entries, listing.revision)

    async def look(self, number: int, breaks_at: int = 0, *, is_after: bool = False) -> None:
        decider, breaking = self.deciders[number], self.breaking[number]
        listing = await self.store.list_prefix(ROOT)
        await decider.mirror.wait_for(max((one.mod_revision for one in listing.entries), default=0), HANG_S)
        breaking.left, breaking.is_after = breaks_at, is_after
        try:
            await decider.cycle.look()
        except UnavailableError:
            assert breaks_at
        finally:
            breaking.left = 0

    async def publish(self) -> None:
        seen = await self.seen()
        for one in HOSTS:
            entries = []
            for (host_id, which), used in self.counters.items():
                order = seen.assignments.get(which)
                known = self.metered.get((host_id, which))
                if host_id != one.host_id or (order is None and known is None):
                    continue
                payers = order.accounts if order is not None else known.accounts if known is not None else ()
                entry = MeterEntry(which, DEMO, 1, used, payers)
                entries.append(entry)
                if known is None or known.used.wall_ms < used.wall_ms:
                    self.metered[host_id, which] = entry
            self.period[one.host_id] += 1
            meter = Meter(one.host_id, self.period[one.host_id], NOW_MS, tuple(entries))
            await self.put(Put(meter_key(one.host_id), encode(meter)))


async def play(history: Sequence[tuple[Any, ...]]) -> None:
    world = World()
    async with AsyncExitStack() as stack:
        for number in range(2):
            decider = Decider(cast(Store, world.breaking[number]), Unmoved(LEADER, 0))
            world.deciders.append(decider)
            await stack.enter_async_context(running(decider.mirror.run()))
        await world.put(Put(PRICES, encode(PRICE)), *(put for one in HOSTS for put in host_puts(one)))
        for name, most in LIMITS.items():
            made = Budget(DEMO, name, PARENTS.get(name, ""), Limits(most), "me", NOW_MS)
            await world.put(Put(budget_key(DEMO, name), encode(made)))
        await lead(world, 0)
        await lead(world, 1)
        for step in (*OPENING, *history):
            await act(world, step)
            check_limits(await world.seen())
        await quiesce(world)
        check_limits(await world.seen())


async def lead(world: World, number: int) -> None:
    await world.put(Put(LEADER, b"%d" % number))
    fence = Unmoved(LEADER, world.revision)
    world.deciders[number].fence = fence


async def act(world: World, step: tuple[Any, ...]) -> None:
    match step:
        case ("create", number, account, vcpus):
            wish = record(number, spec=spec(number, budget=account, resources=Resources(vcpus, 512, 1024)))
            if wish.sandbox_id not in world.created:
                world.created.add(wish.sandbox_id)
                await world.put(*record_puts(wish))
        case ("look", which, breaks_at, is_after):
            await world.look(which, breaks_at, is_after=is_after)
        case ("lead", which):
            await lead(world, which)
        case ("meter", elapsed_ms):
            await measure(world, elapsed_ms)
        case ("again",):
            await world.publish()
        case ("forget",):
            world.counters = {}
            world.period.clear()
            world.has_gone_back = True
        case (kind, number, *rest):
            await tell(world, kind, sandbox_id(number), rest)


async def tell(world: World, kind: str, which: SandboxId, rest: Sequence[Any]) -> None:
    """What a host or an owner says of one sandbox."""
    seen = await world.seen()
    wish, order = seen.records.get(which), seen.assignments.get(which)
    if kind == "remove" and wish is not None and wish.goal is not Goal.REMOVE:
        await world.put(record_puts(replace(wish, goal=Goal.REMOVE, generation=wish.generation + 1))[0])
    if order is None or kind == "remove":
        return
    key = status_key(order.host_id, which)
    told = seen.statuses.get((order.host_id, which))
    if order.goal is Goal.REMOVE and kind == "end":
        await world.put(Put(key, encode(status(order, Phase.REMOVED, released=True))))
    elif kind == "run" and (told is None or told.phase is Phase.RUNNING):
        started = (Stage(StageName.DOMAIN_STARTED, NOW_MS),)
        await world.put(Put(key, encode(status(order, stages=started))))
    elif kind == "end" and order.goal is not Goal.REMOVE:
        await world.put(Put(key, encode(status(order, rest[0], released=True))))


async def measure(world: World, elapsed_ms: int) -> None:
    """What runs has run on for so long, and every host says so."""
    seen = await world.seen()
    for (host_id, which), told in seen.statuses.items():
        if told.phase is Phase.RUNNING:
            world.elapsed_ms[host_id, which] += elapsed_ms
            before = world.counters.get((host_id, which), Totals())
            world.counters[host_id, which] = Totals(before.wall_ms + elapsed_ms, before.vcpu_ms + elapsed_ms)
    await world.publish()


def check_limits(seen: Snapshot) -> None:
    """By every order there is, no account has more set aside than it may."""
    used: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for order in (*seen.assignments.values(), *seen.remnants.values()):
        held = set_aside(order, seen.status_of(order))
        for account in accounts_of(order):
            used[account] += Counter(vcpus=held.vcpus, sandboxes=held.sandboxes)
    for account, most in LIMITS.items():
        assert used[account]["vcpus"] <= most.vcpus
        assert not most.sandboxes or used[account]["sandboxes"] <= most.sandboxes


async def quiesce(world: World) -> None:
    """Once nothing breaks any more: what is set aside is the sum over orders, and every use is charged once."""
    await lead(world, 0)
    before = -1
    for _ in range(LOOKS_MAX):
        await world.look(0)
        revision = (await world.store.list_prefix(ROOT)).revision
        if revision == before:
            break
        before = revision
    seen = await world.seen()
    assert not seen.sums.unbalanced
    assert not seen.sums.uncharged
    spent: Counter[str] = Counter()
    true: Counter[str] = Counter()
    for where, entry in world.metered.items():
        for account in entry.accounts:
            spent[account] += entry.used.wall_ms
            true[account] += world.elapsed_ms[where]
    for account in LIMITS:
        balance = seen.balances.get((DEMO, account), Balance(DEMO, account))
        assert balance.reserved == seen.reserved_by_account.get((DEMO, account), Amounts())
        assert balance.spent.wall_ms <= true[account]
        assert world.has_gone_back or balance.spent.wall_ms == spent[account]
        assert balance.spent.cost_micro == balance.spent.vcpu_ms


@given(st.lists(steps, min_size=5, max_size=40))
@settings(max_examples=100, deadline=None)
def test_no_interleaving_exceeds_or_double_charges(history: list[tuple[Any, ...]]) -> None:
    """At every prefix the orders keep within every limit of every account; in the end reservations are the sums over live orders
    and each metered millisecond is charged exactly once, whatever broke, came twice, or went back with a host's lost state."""
    asyncio.run(play(history))
