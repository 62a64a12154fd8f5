"""Interrupted at every step, with hosts that come and go and leaders that are late: nothing runs twice, and what may runs.

The decisions and commits are the scheduler's own; the hosts are a model that keeps the time-table of hostd's fence.
"""

import asyncio
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.codec import decode, encode
from fleet.model.assignment import Assignment
from fleet.model.host import HostAlive
from fleet.model.ids import HostId, SandboxId
from fleet.model.sandbox import Agent, Goal, Phase, Reason, Restart, SandboxRecord, SandboxStatus, Stage, StageName
from fleet.store.keyspace import (
    LEADER,
    RECORDS,
    ROOT,
    alive_key,
    host_assignments,
    host_key,
    status_key,
)
from fleet.store.memory import MemoryStore
from fleet.store.port import Delete, Put, Unmoved
from hostd.reconcile.fence import KILL_AFTER_MS, PAUSE_BEFORE_MS
from scheduler.commit import Change, Committer, lifecycle_changes, plan_changes, repair_changes
from scheduler.contents import snapshot_of
from scheduler.moves import move_changes, registration_of
from scheduler.placement.evictions import Absence, due_moves, find_absent
from scheduler.placement.lifecycle import due_changes
from scheduler.placement.snapshot import Snapshot, repairs
from tests.unit.scheduler.build import NOW_MS, host, planned, record, record_puts, spec

# A property of plans takes seconds of a processor.
pytestmark = pytest.mark.slow

LEASE_S = 15.0
NAMES = ("one", "two", "three")
RESTARTING = (Agent("worker", "custom", ("true",), restart=Restart.ALWAYS, memory_mib=256),)
SANDBOXES = (*(record(number, spec=spec(number, agents=RESTARTING)) for number in range(2)), record(2))
# How often a host renews and a leader looks, while each of them can.
BEAT_S = 4
# What lost its hosts often waits up to an hour before it costs another: so many times a hundred seconds are more.
QUIET_STEPS = 40


@dataclass
class HostModel:
    """One host: what it runs by the orders it read last, and until when its lease is sure."""

    name: str
    sure_until_s: float = 0.0
    is_cut: bool = False
    # hostd itself is stopped: nobody pauses, and only the guard is left.
    is_stuck: bool = False
    running: set[SandboxId] = field(default_factory=set)
    failed: set[SandboxId] = field(default_factory=set)
    orders: dict[SandboxId, Assignment] = field(default_factory=dict)

    def is_paused(self, now_s: float) -> bool:
        return not self.is_stuck and now_s >= self.sure_until_s - PAUSE_BEFORE_MS / 1000

    def keep_fence(self, now_s: float) -> None:
        """What hostd or its guard does by the clock alone."""
        if now_s >= self.sure_until_s + KILL_AFTER_MS / 1000:
            self.failed |= self.running
            self.running.clear()


class World:
    """A store, three hosts and a leader with what it remembers."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.store = MemoryStore(lambda: self.now_s)
        self.hosts = [HostModel(name) for name in NAMES]
        self.absent: dict[HostId, Absence] = {}
        self.stale: Snapshot | None = None
        self.begun: dict[SandboxId, int] = {}
        self.committer = Committer(self.store, lambda: self.now_s)
        self.fence = Unmoved(LEADER, 0)
        self.is_looking = True

    async def begin(self) -> None:
        self.fence = Unmoved(LEADER, (await self.store.transact([], [Put(LEADER, b"x")])).revision)
        await self.store.transact([], [put for wish in SANDBOXES for put in record_puts(wish)])
        for one in self.hosts:
            await self.beat(one)
        await self.pass_time(2 * BEAT_S)

    @property
    def now_ms(self) -> int:
        return NOW_MS + int(self.now_s * 1000)

    async def beat(self, one: HostModel) -> None:
        """A host that reaches the store renews or registers, reads its orders, obeys and reports."""
        if one.is_cut or one.is_stuck:
            return
        host_id = HostId(one.name)
        if await self.store.get(alive_key(host_id)) is None or self.now_s >= one.sure_until_s:
            puts = [Put(host_key(host_id), encode(host(one.name, is_fenced=True)))]
            puts.append(Put(alive_key(host_id), encode(HostAlive(host_id, "boot", 1))))
            await self.store.transact([], puts)
        one.sure_until_s = self.now_s + LEASE_S
        listing = await self.store.list_prefix(host_assignments(host_id))
        orders = {order.sandbox_id: order for order in (decode(Assignment, entry.value) for entry in listing.entries)}
        for sandbox_id, order in orders.items():
            known = one.orders.get(sandbox_id)
            if known is not None and known.placement < order.placement:
                assert sandbox_id not in one.running | one.failed
            self.obey(one, order)
            await self.report(one, order)
        one.orders = orders

    def obey(self, one: HostModel, order: Assignment) -> None:
        sandbox_id = order.sandbox_id
        if order.goal is Goal.RUN and sandbox_id not in one.running | one.failed:
            one.running.add(sandbox_id)
            self.begun[sandbox_id] = self.begun.get(sandbox_id, 0) + 1
        if order.goal is Goal.REMOVE:
            one.running.discard(sandbox_id)
            one.failed.discard(sandbox_id)

    async def report(self, one: HostModel, order: Assignment) -> None:
        phases = {Goal.RUN: Phase.RUNNING, Goal.STOP: Phase.STOPPED, Goal.REMOVE: Phase.REMOVED}
        phase = Phase.FAILED if order.sandbox_id in one.failed else phases[order.goal]
        said = SandboxStatus(
            order.sandbox_id,
            order.host_id,
            order.generation,
            phase,
            Reason("host_fenced", "its host could not renew its lease") if phase is Phase.FAILED else None,
            stages=(Stage(StageName.DOMAIN_STARTED, 1),),
            released=phase is not Phase.RUNNING,
            run=order.run,
            placement=order.placement,
        )
        await self.store.transact([], [Put(status_key(order.host_id, order.sandbox_id), encode(said))])

    async def expire(self, one: HostModel) -> None:
        """etcd ends a lease when it is over, and not before."""
        if self.now_s >= one.sure_until_s:
            await self.store.transact([], [Delete(alive_key(HostId(one.name)))])

    async def snapshot(self) -> Snapshot:
        listing = await self.store.list_prefix(ROOT)
        return snapshot_of(listing.entries, listing.revision)

    async def look(self, *, stops_after: int = 99, is_stale: bool = False) -> None:
        """The leader's rounds; it may see the store as it was, and may die after so many transactions."""
        for _ in range(4):
            snapshot = self.stale if is_stale and self.stale is not None else await self.snapshot()
            self.stale = snapshot
            self.absent = find_absent(snapshot, self.absent, registration_of(snapshot), self.now_s)
            changes = self.decide(snapshot)
            for change in changes[:stops_after]:
                outcome = await self.committer.commit(self.fence, [change])
                if not outcome.is_committed:
                    return
            if not changes or stops_after < len(changes) or is_stale:
                return

    def decide(self, snapshot: Snapshot) -> list[Change]:
        due = [*lifecycle_changes(snapshot, due_changes(snapshot))]
        moves = due_moves(snapshot, self.absent, now_s=self.now_s, now_ms=self.now_ms)
        due = due or [*move_changes(snapshot, moves, self.now_ms)]
        due = due or [*repair_changes(snapshot, repairs(snapshot))]
        return due or [*plan_changes(snapshot, planned(snapshot, self.now_ms))]

    def check(self) -> None:
        for wish in SANDBOXES:
            places = [
                one.name for one in self.hosts if wish.sandbox_id in one.running and not one.is_paused(self.now_s)
            ]
            assert len(places) <= 1, (wish.sandbox_id, places, self.now_s)
        # What does not restart has begun once at most.
        assert self.begun.get(SANDBOXES[2].sandbox_id, 0) <= 1

    async def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now_s += 1
            for number, one in enumerate(self.hosts):
                one.keep_fence(self.now_s)
                await self.expire(one)
                if int(self.now_s) % BEAT_S == number:
                    await self.beat(one)
                self.check()
            if self.is_looking and int(self.now_s) % BEAT_S == len(self.hosts):
                await self.look()


WHO = st.integers(0, len(NAMES) - 1)
STEPS = st.one_of(
    st.tuples(st.just("time"), st.integers(1, 40)),
    st.tuples(st.sampled_from(["cut", "stick", "free", "beat"]), WHO),
    st.tuples(st.sampled_from(["look", "late look"]), st.integers(0, 3)),
    st.tuples(st.sampled_from(["new leader", "leader sleeps", "leader wakes"]), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=25))
def test_nothing_runs_twice_and_what_may_runs_in_the_end(steps: list[tuple[str, int]]) -> None:
    """Whatever is cut, late or interrupted; and once all is quiet, what restarts runs on a host that is there."""
    asyncio.run(_live(steps))


async def _live(steps: list[tuple[str, int]]) -> None:
    world = World()
    await world.begin()
    for step, number in steps:
        match step:
            case "time":
                await world.pass_time(number)
            case "cut":
                world.hosts[number].is_cut = True
            case "stick":
                world.hosts[number].is_stuck = True
            case "free":
                world.hosts[number].is_cut = world.hosts[number].is_stuck = False
            case "beat":
                await world.beat(world.hosts[number])
            case "look" | "late look":
                await world.look(stops_after=number or 99, is_stale=step == "late look")
            case "new leader":
                world.absent = {}
            case _:
                world.is_looking = step == "leader wakes"
        world.check()
    await _settle(world)


async def _settle(world: World) -> None:
    # One host stays away for good; the others are there.
    world.hosts[0].is_cut, world.is_looking = True, True
    for one in world.hosts[1:]:
        one.is_cut = one.is_stuck = False
    records: list[SandboxRecord] = []
    for _ in range(QUIET_STEPS):
        await world.pass_time(20 * BEAT_S)
        records = [decode(SandboxRecord, one.value) for one in (await world.store.list_prefix(RECORDS)).entries]
        if all(_is_settled(world, wish) for wish in records):
            return
    raise AssertionError([replace(wish, spec=SANDBOXES[0].spec) for wish in records])


def _is_settled(world: World, wish: SandboxRecord) -> bool:
    runs = any(wish.sandbox_id in one.running for one in world.hosts[1:])
    if wish.spec.agents == RESTARTING:
        return runs
    has_failed = any(wish.sandbox_id in one.failed for one in world.hosts[1:])
    return runs or has_failed or wish.goal is Goal.STOP
