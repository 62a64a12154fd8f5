"""Orders come from the store into hostd's own folder, and go only when their sandbox was destroyed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
from structlog.testing import capture_logs

from fleet.codec import encode
from fleet.errors import HostFaultError
from fleet.model.assignment import Assignment
from fleet.model.host import Accelerator
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal, Phase, SandboxStatus, Stage, StageName
from fleet.store.keyspace import assignment_key, host_assignments, status_key
from fleet.store.memory import MemoryStore
from fleet.store.mirror import Mirror
from fleet.store.port import Delete, Put
from hostd.intake import Intake
from hostd.publish import Publisher
from tests.integration.hostd.parts import HOST, A, B, Hostd, Room

HANG_S = 20.0


class Place:
    """A store, a host without a running reconciler, and the intake between them."""

    def __init__(self, folder: Path) -> None:
        self.store = MemoryStore(monotonic)
        self.room = Room(folder)
        self.hostd = Hostd(self.room)
        self.mirror = Mirror(self.store, host_assignments(HOST))
        orders, reconciler = self.hostd.orders, self.hostd.reconciler
        publisher = Publisher(HOST, self.store, orders, reconciler, Accelerator.SIMULATED)
        self.intake = Intake(HOST, publisher.recall, self.mirror, orders, reconciler)
        # As a host that has its lease.
        self.intake.registered.set()

    async def put(self, *orders: Assignment) -> None:
        writes = [Put(assignment_key(HOST, order.sandbox_id), encode(order)) for order in orders]
        await self.store.transact([], writes)

    async def delete(self, sandbox_id: SandboxId) -> None:
        await self.store.transact([], [Delete(assignment_key(HOST, sandbox_id))])

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Waits until it is so; whatever the intake takes or forgets nudges the reconciler or moves the mirror."""
        async with asyncio.timeout(HANG_S):
            while not is_so():
                changed = self.mirror.changed()
                # The intake waits for the same event, and was first to do so.
                await asyncio.sleep(0)
                if not is_so():
                    await changed.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.mirror.run()), asyncio.create_task(self.intake.run())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    """One host; its links are closed afterwards."""
    place = Place(tmp_path)
    yield place
    await place.hostd.links.close()


async def test_orders_are_taken_and_changed(place: Place) -> None:
    """What the scheduler orders is on the host's disk, and what it orders instead replaces it."""
    order = place.room.order()
    await place.put(order)
    async with place.running():
        await place.until(lambda: A in place.hostd.orders.orders)
        assert place.hostd.orders.orders[A] == order
        stop = replace(order, goal=Goal.STOP, generation=2)
        await place.put(stop)
        await place.until(lambda: place.hostd.orders.orders[A] == stop)


async def test_an_order_that_vanishes_is_kept(place: Place) -> None:
    """A store that lost its data ends no running VM: only a sandbox that was ordered away is forgotten."""
    kept, removed = place.room.order(), place.room.order(sandbox_id=B)
    await place.put(kept, removed)
    async with place.running():
        await place.until(lambda: {A, B} <= set(place.hostd.orders.orders))
        await place.put(replace(removed, goal=Goal.REMOVE, generation=2))
        await place.until(lambda: place.hostd.orders.orders[B].goal is Goal.REMOVE)
        await place.delete(A)
        await place.delete(B)
        await place.until(lambda: B not in place.hostd.orders.orders)
        assert place.hostd.orders.orders[A] == kept
        # And it is obeyed again when it comes back.
        stop = replace(kept, goal=Goal.STOP, generation=2)
        await place.put(stop)
        await place.until(lambda: place.hostd.orders.orders[A] == stop)


async def test_a_vanished_order_is_warned_of_once(place: Place) -> None:
    """The operator is told when an order goes missing, and not again at every look; one that goes missing anew is told anew."""
    order, other = place.room.order(), place.room.order(sandbox_id=B)

    async def look(generation: int) -> None:
        changed = replace(other, generation=generation)
        await place.put(changed)
        await place.until(lambda: place.hostd.orders.orders.get(B) == changed)

    with capture_logs() as logs:
        async with place.running():
            for start in (10, 20):
                await place.put(replace(order, generation=start))
                await look(start)
                await place.delete(A)
                for generation in range(start + 1, start + 4):
                    await look(generation)
    assert [(line["event"], line["sandbox_id"]) for line in logs if line["event"] == "order.vanished"] == [
        ("order.vanished", A),
        ("order.vanished", A),
    ]


async def test_an_order_that_found_no_room_is_tried_again(place: Place) -> None:
    """The sixth sandbox on a network of five addresses is not lost: it is taken when one of them is free, and holds up no other."""
    ids = [SandboxId(letter * 12) for letter in "abcdef"]
    orders = [place.room.order(sandbox_id=sandbox_id) for sandbox_id in ids]
    first, second, last = ids[0], ids[1], ids[-1]
    await place.put(*orders)
    async with place.running():
        await place.until(lambda: len(place.hostd.orders.orders) == len(ids) - 1)
        remove = replace(orders[0], goal=Goal.REMOVE, generation=2)
        await place.put(remove)
        await place.until(lambda: place.hostd.orders.orders[first] == remove)
        assert last not in place.hostd.orders.orders
        place.hostd.orders.remove_folder(first)
        await place.put(replace(orders[1], generation=2))
        await place.until(lambda: place.hostd.orders.orders[second].generation == 2)
        assert last in place.hostd.orders.orders
    addresses = [progress.address for progress in place.hostd.orders.progress.values()]
    assert len(set(addresses)) == len(addresses)


async def test_what_cannot_be_read_is_passed_over(place: Place) -> None:
    """An order of a newer scheduler's making holds up no other."""
    await place.store.transact([], [Put(assignment_key(HOST, B), b"\xff\xff\xff")])
    await place.put(place.room.order())
    async with place.running():
        await place.until(lambda: A in place.hostd.orders.orders)
        assert B not in place.hostd.orders.orders


async def test_a_store_that_is_away_changes_nothing(place: Place) -> None:
    """With the store away at the start the last orders stay in force, and nothing is forgotten."""
    order = place.room.order()
    place.hostd.reconciler.accept(order)
    place.store.is_reachable = False
    async with place.running():
        for _ in range(100):
            await asyncio.sleep(0)
        assert dict(place.hostd.orders.orders) == {A: order}


@pytest.mark.parametrize(
    "told",
    [
        SandboxStatus(A, HOST, 1, Phase.RUNNING, stages=(Stage(StageName.CONFIGURED, 1),)),
        SandboxStatus(A, HOST, 1, Phase.COMPLETED),
    ],
)
async def test_a_host_that_lost_its_state_runs_no_agent_twice(place: Place, told: SandboxStatus) -> None:
    """What the store has of an earlier hostd's word outlives the host's disk: such a sandbox fails, and no VM is begun for it."""
    other = SandboxStatus(B, HOST, 1, Phase.STARTING)
    statuses = [Put(status_key(HOST, status.sandbox_id), encode(status)) for status in (told, other)]
    await place.store.transact([], statuses)
    await place.put(place.room.order(), place.room.order(sandbox_id=B))
    async with place.running():
        await place.until(lambda: {A, B} <= set(place.hostd.orders.orders))
    failure = place.hostd.orders.progress[A].failure
    assert failure is not None
    assert failure.code == "state_lost"
    # Its guest had never been told what to run.
    assert place.hostd.orders.progress[B].failure is None


async def test_a_machine_that_only_bears_the_name_takes_no_orders(place: Place) -> None:
    """A clone of a host is refused its registration; until it has one it runs nothing that the true host may be running."""
    place.intake.registered.clear()
    await place.put(place.room.order())
    async with place.running():
        await place.until(lambda: place.mirror.is_fresh)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not place.hostd.orders.orders
        place.intake.registered.set()
        await place.until(lambda: A in place.hostd.orders.orders)


async def test_no_address_is_given_twice_and_all_are_given(tmp_path: Path) -> None:
    """Never the bridge's own. When none is left the order is not taken, and can be as soon as one is free."""
    room = Room(tmp_path)
    hostd = Hostd(room)
    ids = [SandboxId(letter * 12) for letter in "abcdef"]
    for sandbox_id in ids[:5]:
        hostd.accept(room.order(sandbox_id=sandbox_id))
    addresses = {progress.address for progress in hostd.orders.progress.values()}
    assert addresses == {f"10.77.0.{number}" for number in (1, 2, 4, 5, 6)}
    with pytest.raises(HostFaultError) as caught:
        hostd.accept(room.order(sandbox_id=ids[5]))
    assert caught.value.code == "addresses_exhausted"
    assert ids[5] not in hostd.orders.orders
    hostd.orders.remove_folder(ids[0])
    hostd.accept(room.order(sandbox_id=ids[5]))
    assert ids[5] in hostd.orders.orders
