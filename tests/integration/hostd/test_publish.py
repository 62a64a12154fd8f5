"""What hostd publishes is what is so, written once, and only while the host's lease is its own."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.codec import decode, encode
from fleet.model.host import Accelerator
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal, Phase, SandboxStatus
from fleet.store.keyspace import host_statuses, status_key
from fleet.store.memory import MemoryStore
from fleet.store.port import Put, Unmoved
from hostd.drivers.simulated import PlannedFaults
from hostd.publish import COUNTERS_INTERVAL_MS, WRITES_MAX, Publisher
from tests.integration.hostd.parts import HOST, A, Hostd, Room

pytestmark = pytest.mark.timeout(60)
ALIVE = "/alive"


async def without_pause(_delay_s: float) -> None:
    await asyncio.sleep(0)


class Desk:
    """A host's publisher, the store it writes to, and the lease it holds."""

    def __init__(self, hostd: Hostd, store: MemoryStore) -> None:
        self.hostd = hostd
        self.store = store
        self.fence: Unmoved | None = None
        self.now_ms = 1_000_000
        self.publisher = Publisher(
            HOST,
            store,
            hostd.orders,
            hostd.reconciler,
            Accelerator.SIMULATED,
            pause=without_pause,
            now_ms=lambda: self.now_ms,
        )

    async def take_lease(self) -> None:
        committed = await self.store.transact([], [Put(ALIVE, b"")])
        self.fence = Unmoved(ALIVE, committed.revision)

    async def statuses(self) -> dict[SandboxId, SandboxStatus]:
        listing = await self.store.list_prefix(host_statuses(HOST))
        found = [decode(SandboxStatus, entry.value) for entry in listing.entries]
        return {status.sandbox_id: status for status in found}

    async def until(self, is_so: Callable[[dict[SandboxId, SandboxStatus]], bool]) -> dict[SandboxId, SandboxStatus]:
        """The statuses as soon as it is so; looked at after every change in the store."""
        async with self.store.watch("/", 0) as batches:
            if is_so(found := await self.statuses()):
                return found
            async for _ in batches:
                if is_so(found := await self.statuses()):
                    return found
        raise AssertionError

    async def until_phase(self, phase: Phase) -> SandboxStatus:
        found = await self.until(lambda statuses: A in statuses and statuses[A].phase is phase)
        return found[A]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.hostd.reconciler.on_pass(self.publisher.nudge)
        runner = asyncio.create_task(self.publisher.run(lambda: self.fence))
        try:
            yield
        finally:
            runner.cancel()
            await asyncio.wait([runner])
            assert runner.cancelled(), runner.exception()


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A running host that publishes, with its lease."""
    async with Hostd(Room(tmp_path)).running() as hostd:
        desk = Desk(hostd, MemoryStore(lambda: 0.0))
        await desk.take_lease()
        async with desk.running():
            yield desk


async def test_a_life_is_published(desk: Desk) -> None:
    """From running to completed and released, then removed; the key goes with the order."""
    room = desk.hostd.room
    desk.hostd.accept(room.order())
    status = (await desk.until(lambda found: A in found and found[A].released))[A]
    assert (status.phase, status.accelerator, status.generation) == (Phase.COMPLETED, "simulated", 1)
    desk.hostd.accept(room.order(goal=Goal.REMOVE, generation=2))
    status = await desk.until_phase(Phase.REMOVED)
    assert (status.released, status.generation) == (True, 2)
    desk.hostd.orders.forget_order(A)
    desk.publisher.nudge()
    assert await desk.until(lambda found: A not in found) == {}


async def test_counters_alone_are_told_now_and_then(desk: Desk) -> None:
    """An agent that prints all the time costs the store one write each few seconds, and its last count is told all the same."""
    desk.hostd.accept(desk.hostd.room.order("sleep"))
    await desk.until(lambda found: A in found and found[A].agents[0].output_bytes > 0)
    await desk.hostd.until_pass()
    before = await desk.store.get(status_key(HOST, A))
    progress = desk.hostd.orders.progress[A]
    agents = tuple(replace(agent, output_bytes=agent.output_bytes + 1000) for agent in progress.agents)
    desk.hostd.orders.hold_progress(replace(progress, agents=agents))
    for _ in range(3):
        await desk.hostd.until_pass()
        await asyncio.sleep(0)
    assert await desk.store.get(status_key(HOST, A)) == before
    desk.now_ms += COUNTERS_INTERVAL_MS
    desk.publisher.nudge()
    await desk.until(lambda found: found[A].agents == agents)


async def test_what_has_not_changed_is_not_written(desk: Desk) -> None:
    """Passes without news cost the store nothing."""
    desk.hostd.accept(desk.hostd.room.order("sleep"))
    await desk.until_phase(Phase.RUNNING)
    await desk.hostd.until_pass()
    before = await desk.store.get(status_key(HOST, A))
    for _ in range(3):
        await desk.hostd.until_pass()
        await asyncio.sleep(0)
    assert await desk.store.get(status_key(HOST, A)) == before


async def test_trouble_is_shown_while_it_is_retried(tmp_path: Path) -> None:
    """A sandbox that cannot start yet says why, before it has failed."""
    async with Hostd(Room(tmp_path, PlannedFaults({"scratch": {1}}))).running() as hostd:
        desk = Desk(hostd, MemoryStore(lambda: 0.0))
        await desk.take_lease()
        async with desk.running():
            hostd.accept(hostd.room.order("sleep"))
            status = (await desk.until(lambda found: A in found and found[A].reason is not None))[A]
            assert status.reason is not None
            assert (status.phase, status.reason.code) == (Phase.STARTING, "scratch_failed")
            hostd.pass_time(60)
            assert (await desk.until_phase(Phase.RUNNING)).reason is None


async def test_nothing_is_written_without_the_lease(desk: Desk) -> None:
    """A host that has lost its lease, or only thinks it has it, writes nothing; with a new one everything at once."""
    desk.hostd.accept(desk.hostd.room.order("sleep"))
    await desk.until_phase(Phase.RUNNING)
    # Somebody else's now, by the store's word alone.
    await desk.store.transact([], [Put(ALIVE, b"")])
    desk.hostd.accept(desk.hostd.room.order("sleep", goal=Goal.STOP, generation=2))
    await desk.hostd.until_phase(Phase.STOPPED)
    await desk.hostd.until_pass()
    assert (await desk.statuses())[A].generation == 1
    desk.fence = None
    await desk.hostd.until_pass()
    assert (await desk.statuses())[A].generation == 1
    await desk.take_lease()
    desk.publisher.nudge()
    assert (await desk.until_phase(Phase.STOPPED)).generation == 2


async def test_a_store_that_was_away_gets_everything(desk: Desk) -> None:
    """What changed meanwhile is written when it is back."""
    desk.store.is_reachable = False
    desk.hostd.accept(desk.hostd.room.order())
    await desk.hostd.until_phase(Phase.COMPLETED)
    await desk.hostd.until_pass()
    desk.store.is_reachable = True
    assert (await desk.until_phase(Phase.COMPLETED)).agents[0].exit_code == 0


async def test_leftovers_in_the_store_are_put_right(tmp_path: Path) -> None:
    """Statuses of sandboxes that are none, and bytes that no version wrote, are replaced or deleted by the next hostd."""
    async with Hostd(Room(tmp_path)).running() as hostd:
        desk = Desk(hostd, MemoryStore(lambda: 0.0))
        gone, odd = SandboxId("c" * 12), SandboxId("d" * 12)
        stale = SandboxStatus(gone, HOST, 1, Phase.RUNNING)
        writes = [(gone, encode(stale)), (odd, b"\xff"), (A, b"\xff")]
        await desk.store.transact([], [Put(status_key(HOST, id_), content) for id_, content in writes])
        await desk.take_lease()
        async with desk.running():
            hostd.accept(hostd.room.order())
            await hostd.until_phase(Phase.COMPLETED)

            async def is_clean() -> bool:
                listing = await desk.store.list_prefix(host_statuses(HOST))
                return [entry.key for entry in listing.entries] == [status_key(HOST, A)]

            async with desk.store.watch("/", 0) as batches:
                if not await is_clean():
                    async for _ in batches:
                        if await is_clean():
                            break
            assert set(await desk.statuses()) == {A}


async def test_many_statuses_are_written_in_pieces(desk: Desk) -> None:
    """More than one transaction holds, all arrive."""
    ids = [SandboxId(f"{chr(97 + index // 26)}{chr(97 + index % 26)}" + "a" * 10) for index in range(WRITES_MAX + 5)]
    for sandbox_id in ids:
        desk.hostd.accept(desk.hostd.room.order(sandbox_id=sandbox_id, goal=Goal.REMOVE))
    found = await desk.until(lambda found: len(found) == len(ids))
    assert {status.phase for status in found.values()} <= {Phase.REMOVED, Phase.REMOVING}
