"""The leader's loop and hosts that go away: what it writes, and what the host's return makes void."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.codec import decode, encode
from fleet.model.assignment import Assignment
from fleet.model.event import Event
from fleet.model.host import HostLosses, HostRecord
from fleet.model.ids import HostId
from fleet.model.sandbox import Agent, Goal, Phase, Reason, Restart, SandboxRecord, Stage, StageName
from fleet.store.keyspace import (
    ASSIGNMENTS,
    HOSTS,
    alive_key,
    assignment_key,
    events_of,
    losses_key,
    record_key,
    status_key,
)
from fleet.store.memory import MemoryStore
from fleet.store.mirror import Mirror
from fleet.store.port import Delete, Put, Store, Unmoved, Write
from scheduler.commit import Committer
from scheduler.moves import move_changes, registration_of
from scheduler.placement.evictions import FENCE_WAIT_S, LOSS_S, Eviction, due_moves, find_absent, halt
from tests.integration.scheduler.hosting import running_hostd
from tests.integration.scheduler.parts import HANG_S, Decider, running
from tests.unit.scheduler.build import DEMO, NOW_MS, host, host_puts, record, record_puts, spec, status

ONE, TWO = host("one", is_fenced=True), host("two", is_fenced=True)
WISH = record(spec=spec(agents=(Agent("worker", "custom", ("true",), restart=Restart.ALWAYS, memory_mib=256),)))
BEGUN = (Stage(StageName.DOMAIN_STARTED, 1),)


async def write(store: Store, decider: Decider, *writes: Write) -> None:
    """Writes, and the decider has seen it."""
    await decider.mirror.wait_for((await store.transact([], writes)).revision, HANG_S)


async def look(decider: Decider, later_s: float = 0.0) -> None:
    """One look, so much later; the first of an absence begins its count."""
    decider.clock_s += later_s
    decider.now_ms += int(later_s * 1000)
    await decider.cycle.look()


async def orders_in(store: Store) -> dict[HostId, Assignment]:
    found = [decode(Assignment, entry.value) for entry in (await store.list_prefix(ASSIGNMENTS)).entries]
    return {order.host_id: order for order in found}


async def wish_in(store: Store) -> SandboxRecord:
    found = await store.get(record_key(DEMO, WISH.sandbox_id))
    assert found is not None
    return decode(SandboxRecord, found.value)


async def place(store: Store, decider: Decider, wish: SandboxRecord = WISH) -> Assignment:
    """The sandbox runs on host one, and host two is there."""
    await write(store, decider, *host_puts(ONE), *record_puts(wish))
    await look(decider)
    order = (await orders_in(store))[ONE.host_id]
    said = status(order, stages=BEGUN, placement=1)
    puts = [Put(status_key(said.host_id, said.sandbox_id), encode(said)), *host_puts(TWO)]
    await write(store, decider, *puts)
    return order


async def test_a_lost_host_gives_up_its_sandbox(store: Store, decider: Decider) -> None:
    """After the wait: another placement of the same run on the other host, the old order to go, and events that say why."""
    first = await place(store, decider)
    await write(store, decider, Delete(alive_key(ONE.host_id)))
    await look(decider)
    await look(decider, FENCE_WAIT_S - 1)
    assert set(await orders_in(store)) == {ONE.host_id}
    await look(decider, 1)
    orders, wish = await orders_in(store), await wish_in(store)
    assert (wish.placement, wish.generation, wish.run, wish.goal) == (2, 2, 1, Goal.RUN)
    second = orders[TWO.host_id]
    assert (second.placement, second.first_run, second.run, second.goal) == (2, 1, 1, Goal.RUN)
    assert orders[ONE.host_id] == replace(first, goal=Goal.REMOVE, generation=2, reason=wish.reason)
    events = [decode(Event, one.value) for one in (await store.list_prefix(events_of(DEMO, WISH.sandbox_id))).entries]
    told = [(event.kind, event.cause) for event in events if event.generation == 2]
    assert told == [("sandbox.assigned", ""), ("sandbox.evicted", "host_lost")]
    # The host is back, and done: nothing of the first placement is left.
    gone = status(orders[ONE.host_id], Phase.REMOVED, released=True, placement=1)
    await write(store, decider, *host_puts(ONE), Put(status_key(ONE.host_id, WISH.sandbox_id), encode(gone)))
    await look(decider)
    assert await orders_in(store) == {TWO.host_id: second}


@pytest.mark.parametrize("again", ["alive", "registered", "wish", "order"])
async def test_a_host_that_is_back_voids_what_was_decided(
    store: Store, decider: Decider, fence: Unmoved, again: str
) -> None:
    """Alive when it is written, registered and gone once more, stopped by its owner, or ordered otherwise: nothing is written."""
    order = await place(store, decider)
    await write(store, decider, Delete(alive_key(ONE.host_id)))
    seen = decider.state.snapshot()
    absent = find_absent(seen, {}, registration_of(seen), 0.0)
    moves = due_moves(seen, absent, now_s=FENCE_WAIT_S, now_ms=NOW_MS)
    assert any(isinstance(move, Eviction) for move in moves)
    changes = [change for change in move_changes(seen, moves, NOW_MS) if len(change.writes) > 1]
    back: dict[str, Sequence[Write]] = {
        "alive": host_puts(ONE)[1:],
        "registered": host_puts(ONE)[:1],
        "wish": record_puts(replace(WISH, goal=Goal.STOP, generation=2))[:1],
        "order": [Put(assignment_key(ONE.host_id, WISH.sandbox_id), encode(replace(order, generation=9)))],
    }
    await store.transact([], back[again])
    assert not (await Committer(store, lambda: 0.0).commit(fence, changes)).is_committed
    assert (await wish_in(store)).placement == 1


async def test_an_absence_with_a_gap_begins_anew(store: Store, decider: Decider) -> None:
    """Gone, back and gone again between two looks: what ran on in the gap has all of the wait again."""
    await place(store, decider)
    await write(store, decider, Delete(alive_key(ONE.host_id)))
    await look(decider)
    await write(store, decider, *host_puts(ONE))
    await write(store, decider, Delete(alive_key(ONE.host_id)))
    await look(decider, FENCE_WAIT_S)
    assert (await wish_in(store)).placement == 1
    await look(decider, FENCE_WAIT_S)
    assert (await wish_in(store)).placement == 2


async def test_what_had_begun_and_does_not_restart_has_failed(store: Store, decider: Decider) -> None:
    """Its record says why; its order stays on the host, which is to stop it, and it is placed nowhere else."""
    await place(store, decider, record())
    await write(store, decider, Delete(alive_key(ONE.host_id)))
    await look(decider)
    await look(decider, FENCE_WAIT_S)
    wish, orders = await wish_in(store), await orders_in(store)
    assert wish.reason is not None
    assert (wish.goal, wish.reason.code, wish.placement) == (Goal.STOP, "host_lost", 1)
    assert {host_id: order.goal for host_id, order in orders.items()} == {ONE.host_id: Goal.STOP}


async def test_a_host_that_keeps_its_vms_keeps_its_sandboxes(store: Store, decider: Decider) -> None:
    """However long it is away: nobody can know that they do not run."""
    await place(store, decider)
    await write(store, decider, *host_puts(replace(ONE, is_fenced=False))[:1], Delete(alive_key(ONE.host_id)))
    await look(decider)
    await look(decider, 10 * FENCE_WAIT_S)
    assert ((await wish_in(store)).placement, set(await orders_in(store))) == (1, {ONE.host_id})


async def test_losses_are_kept_for_the_next_leader(store: Store, decider: Decider) -> None:
    """Noted once while the host is away; its return begins the wait, in which nothing is placed there."""
    await write(store, decider, *host_puts(ONE))
    await write(store, decider, Delete(alive_key(ONE.host_id)))
    await look(decider)
    await look(decider, LOSS_S)
    await look(decider, LOSS_S)
    found = await store.get(losses_key(ONE.host_id))
    assert found is not None
    assert decode(HostLosses, found.value).until_ms == 0
    await write(store, decider, *host_puts(ONE), *record_puts(WISH))
    await look(decider)
    found = await store.get(losses_key(ONE.host_id))
    assert found is not None
    assert decode(HostLosses, found.value).until_ms == decider.now_ms + 30_000
    assert await orders_in(store) == {}
    await look(decider, 31)
    assert set(await orders_in(store)) == {ONE.host_id}


async def test_a_halted_sandbox_moves_once_it_has_stopped(store: Store, decider: Decider, fence: Unmoved) -> None:
    """Its order stops with the reason, its record still wishes it to run, and only its host's word makes room elsewhere."""
    order = await place(store, decider)
    seen = decider.state.snapshot()
    move = halt(seen, WISH.sandbox_id, Reason("preempted", "another needs its room"))
    assert move is not None
    outcome = await Committer(store, lambda: 0.0).commit(fence, list(move_changes(seen, [move], NOW_MS)))
    await decider.mirror.wait_for(outcome.revision, HANG_S)
    await look(decider)
    halted = (await orders_in(store))[ONE.host_id]
    assert (halted.goal, halted.generation, (await wish_in(store)).goal) == (Goal.STOP, 2, Goal.RUN)
    said = status(halted, Phase.STOPPED, released=True, placement=1)
    await write(store, decider, Put(status_key(ONE.host_id, order.sandbox_id), encode(said)))
    await look(decider)
    orders = await orders_in(store)
    assert (orders[ONE.host_id].goal, orders[TWO.host_id].placement) == (Goal.REMOVE, 2)


@pytest.mark.parametrize("fencing", ["kill", "keep"])
async def test_a_host_says_whether_it_ends_its_vms(
    memory: MemoryStore, pki: Path, tmp_path: Path, fencing: str
) -> None:
    """The record that a real hostd registers is what the scheduler goes by: only one that fences itself loses its sandboxes."""
    mirror = Mirror(memory, HOSTS)
    async with running(mirror.run()), running_hostd(pki, tmp_path / "host", memory, fencing=fencing):
        async with asyncio.timeout(HANG_S):
            while not mirror.entries:
                await mirror.changed().wait()
        (entry,) = mirror.entries.values()
    assert decode(HostRecord, entry.value).is_fenced == (fencing == "kill")
