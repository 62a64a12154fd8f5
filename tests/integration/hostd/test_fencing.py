"""A host that cannot renew its lease pauses its VMs, then ends them; one whose lease is back reads its orders first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.codec import encode
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal, Phase
from fleet.store.keyspace import assignment_key, host_assignments
from fleet.store.memory import MemoryStore
from fleet.store.mirror import Mirror
from fleet.store.port import Put
from hostd.drivers.simulated import SimulatedGuard
from hostd.fencing import Fence
from hostd.intake import Intake
from hostd.reconcile.fence import KILL_AFTER_MS, PAUSE_BEFORE_MS
from hostd.reconcile.state import DomainState
from tests.integration.hostd.parts import HOST, A, Hostd, Room

HANG_S = 20.0
LEASE_MS = 15_000


async def _soon(_delay_s: float) -> None:
    await asyncio.sleep(0.01)


class Fenced(Hostd):
    """One run of hostd with its fence, whose lease the test renews."""

    def __init__(self, room: Room, guard: SimulatedGuard) -> None:
        super().__init__(room)
        nudge = self.reconciler.nudge
        self.fence = Fence(self.orders, room.hypervisor, guard, self.now_ms, nudge, pause=_soon)
        self.reconciler.obey(self.fence)

    def renew(self) -> None:
        self.fence.lease_renewed(self.now_ms() + LEASE_MS)

    def settle(self) -> None:
        """A first lease, and its orders read."""
        self.fence.lease_taken()
        self.renew()
        self.fence.orders_read()

    @property
    def domain(self) -> DomainState:
        found = self.room.hypervisor.domains.get(A)
        return found.state if found else DomainState.ABSENT

    async def until_domain(self, state: DomainState) -> None:
        async with asyncio.timeout(HANG_S):
            await self.until(lambda: self.domain is state)

    def wait_ms(self, delay_ms: int) -> None:
        self.pass_time(delay_ms / 1000)

    @asynccontextmanager
    async def fencing(self) -> AsyncIterator["Fenced"]:
        async with self.running():
            runner = asyncio.create_task(self.fence.run())
            try:
                yield self
            finally:
                runner.cancel()
                await asyncio.wait([runner])


@pytest.fixture
def room(tmp_path: Path) -> Room:
    """A machine room without sandboxes."""
    return Room(tmp_path)


@pytest.fixture
def guard(room: Room) -> SimulatedGuard:
    """Its guard, on the room's clock."""
    return SimulatedGuard(room.hypervisor, lambda: int(room.now_s * 1000))


async def begin(hostd: Fenced) -> None:
    hostd.settle()
    hostd.accept(hostd.room.order("sleep 600"))
    await hostd.until_phase(Phase.RUNNING)


async def test_a_lease_that_comes_back_in_time_costs_a_pause(room: Room, guard: SimulatedGuard) -> None:
    """The VM is paused before the lease may have ended, stays so while it has, and runs on with the renewal."""
    async with Fenced(room, guard).fencing() as hostd:
        await begin(hostd)
        hostd.wait_ms(LEASE_MS - PAUSE_BEFORE_MS - 1)
        await hostd.until_pass()
        assert hostd.domain is DomainState.RUNNING
        hostd.wait_ms(1)
        await hostd.until_domain(DomainState.PAUSED)
        hostd.wait_ms(PAUSE_BEFORE_MS + KILL_AFTER_MS - 1)
        for _ in range(3):
            await hostd.until_pass()
            assert hostd.domain is DomainState.PAUSED
        hostd.renew()
        await hostd.until_domain(DomainState.RUNNING)
        assert room.hypervisor.starts == {A: 1}
        assert hostd.status().phase is Phase.RUNNING


async def test_a_lease_that_stays_away_ends_the_sandbox(room: Room, guard: SimulatedGuard) -> None:
    """The VM is gone, the sandbox has failed with the reason, and no lease brings it back."""
    async with Fenced(room, guard).fencing() as hostd:
        await begin(hostd)
        hostd.wait_ms(LEASE_MS + KILL_AFTER_MS)
        await hostd.until_domain(DomainState.ABSENT)
        await hostd.until_released()
        hostd.settle()
        await hostd.until_pass()
        status = hostd.status()
        assert (status.phase, status.reason and status.reason.code) == (Phase.FAILED, "host_fenced")
        assert room.hypervisor.starts == {A: 1}


@pytest.mark.parametrize("is_dead", [False, True], ids=["stopped", "killed"])
async def test_whoever_ended_the_vm_the_reason_is_the_fence(room: Room, guard: SimulatedGuard, is_dead: bool) -> None:
    """hostd stopped or dead past the deadline: the guard ends the VM, and hostd does not call that a death of its own."""
    async with Fenced(room, guard).fencing() as hostd:
        await begin(hostd)
        if not is_dead:
            room.now_s += (LEASE_MS + KILL_AFTER_MS) / 1000
            assert guard.look()
            await hostd.until_phase(Phase.FAILED)
            assert hostd.status().reason == hostd.orders.progress[A].failure
            assert hostd.orders.progress[A].failure is not None
    if is_dead:
        room.now_s += (LEASE_MS + KILL_AFTER_MS) / 1000
        assert guard.look()
        async with Fenced(room, guard).fencing() as hostd:
            await hostd.until_phase(Phase.FAILED)
    failure = hostd.orders.progress[A].failure
    assert failure is not None
    assert failure.code == "host_fenced"


async def test_nothing_begins_before_the_orders_are_read(room: Room, guard: SimulatedGuard) -> None:
    """hostd back without its store starts no VM of yesterday's orders; with its lease it does, once they are today's."""
    async with Fenced(room, guard).fencing() as hostd:
        hostd.accept(room.order("sleep 600"))
        await hostd.until_pass()
        assert hostd.domain is DomainState.ABSENT
        hostd.fence.lease_taken()
        hostd.renew()
        await hostd.until_pass()
        assert hostd.domain is DomainState.ABSENT
        hostd.fence.orders_read()
        await hostd.until_domain(DomainState.RUNNING)


async def test_a_restarted_hostd_leaves_vms_running(room: Room, guard: SimulatedGuard) -> None:
    """kill -9 of hostd costs no pause, while the deadline of the one before is not near."""
    async with Fenced(room, guard).fencing() as hostd:
        await begin(hostd)
    async with Fenced(room, guard).fencing() as hostd:
        await hostd.until_pass()
        assert hostd.domain is DomainState.RUNNING
        hostd.wait_ms(LEASE_MS)
        await hostd.until_domain(DomainState.PAUSED)
        hostd.settle()
        await hostd.until_domain(DomainState.RUNNING)


async def test_a_host_that_boots_ended_what_had_begun(room: Room, guard: SimulatedGuard) -> None:
    """Its agents do not run again here, and the reason is the host's: the scheduler may begin them elsewhere."""
    async with Fenced(room, guard).fencing() as hostd:
        await begin(hostd)
    room.hypervisor.kill_all()
    guard.forget()
    async with Fenced(room, guard).fencing() as hostd:
        hostd.settle()
        status = await hostd.until_phase(Phase.FAILED)
        assert status.reason is not None
        assert status.reason.code == "host_restarted"
        assert room.hypervisor.starts == {A: 1}


async def test_an_update_from_a_hostd_without_a_fence_costs_a_pause(room: Room, guard: SimulatedGuard) -> None:
    """VMs that are there without a word of the guard's are paused until the lease is here, and then run on."""
    async with Fenced(room, guard).fencing() as hostd:
        await begin(hostd)
    guard.forget()
    async with Fenced(room, guard).fencing() as hostd:
        await hostd.until_domain(DomainState.PAUSED)
        hostd.settle()
        await hostd.until_domain(DomainState.RUNNING)
        assert hostd.status().phase is Phase.RUNNING


async def test_a_guard_that_knows_nothing_lengthens_nothing(tmp_path: Path) -> None:
    """A renewal that could not be told to the guard is none: the VM pauses as if it had not come."""
    room = Room(tmp_path)
    guard = SimulatedGuard(room.hypervisor, lambda: int(room.now_s * 1000), _FailsAfter(1))
    async with Fenced(room, guard).fencing() as hostd:
        await begin(hostd)
        hostd.wait_ms(LEASE_MS - PAUSE_BEFORE_MS - 1)
        hostd.renew()
        hostd.wait_ms(1)
        await hostd.until_domain(DomainState.PAUSED)


class _FailsAfter:
    def __init__(self, calls: int) -> None:
        self._left = calls

    def strike(self, step: str, subject: str) -> None:
        from fleet.errors import HostFaultError  # noqa: PLC0415

        self._left -= step == "guard"
        if self._left < 0:
            raise HostFaultError("guard_unarmed", subject)


async def test_what_was_ordered_away_meanwhile_never_runs_on(room: Room, guard: SimulatedGuard) -> None:
    """A new lease, and the sandbox is somewhere else by now: the order to remove it is read before anything resumes."""
    store = MemoryStore(lambda: room.now_s)
    mirror = Mirror(store, host_assignments(HOST))
    order = room.order("sleep 600")
    async with Fenced(room, guard).fencing() as hostd:
        intake = Intake(HOST, _nothing_told, mirror, hostd.orders, hostd.reconciler)
        states: list[DomainState] = []
        room.hypervisor.watch(lambda _id: states.append(hostd.domain))
        runs = [mirror.run(), intake.run(), intake.settle(hostd.fence.orders_read)]
        tasks = [asyncio.create_task(run) for run in runs]
        try:
            await store.transact([], [Put(assignment_key(HOST, A), encode(order))])
            hostd.fence.lease_taken()
            hostd.renew()
            intake.note_registered()
            await hostd.until_domain(DomainState.RUNNING)
            hostd.wait_ms(LEASE_MS)
            await hostd.until_domain(DomainState.PAUSED)
            states.clear()
            gone = replace(order, goal=Goal.REMOVE, generation=2)
            await store.transact([], [Put(assignment_key(HOST, A), encode(gone))])
            hostd.fence.lease_taken()
            hostd.renew()
            intake.note_registered()
            await hostd.until_gone()
            assert DomainState.RUNNING not in states
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _nothing_told() -> dict[object, object]:
    return {}


async def test_no_agent_begins_before_the_fleet_knows_of_its_start(room: Room) -> None:
    """A sandbox that its host has not told of is begun elsewhere when the host is lost: so nothing of it may have run here."""
    told: set[SandboxId] = set()
    hostd = Hostd(room, may_begin=told.__contains__)
    async with hostd.running():
        hostd.accept(room.order("sleep 600"))
        await hostd.until(lambda: hostd.sessions.awaits_word(A))
        await hostd.until_pass()
        assert not hostd.orders.progress[A].is_configured
        assert hostd.sessions.notice(A) is None
        told.add(A)
        hostd.reconciler.nudge()
        await hostd.until_phase(Phase.RUNNING)
