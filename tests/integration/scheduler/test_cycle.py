"""The leader's loop on a store: what it writes, what it leaves alone, and what no race can make of it."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from fleet.codec import decode, encode
from fleet.errors import UnavailableError
from fleet.model.assignment import Assignment, Refusal
from fleet.model.cycle import CycleRecord
from fleet.model.host import Capacity, HostCordon, Reservation
from fleet.model.ids import HostId
from fleet.model.sandbox import Goal, Phase
from fleet.store.keyspace import (
    ASSIGNMENTS,
    LEADER,
    RECORDS,
    RESERVATIONS,
    ROOT,
    TOMBSTONES,
    alive_key,
    assignment_key,
    cordon_key,
    cycle_key,
    host_key,
    record_key,
    refusal_key,
    reservation_key,
)
from fleet.store.memory import MemoryStore
from fleet.store.port import TRANSACTION_OPS_MAX, Delete, Put, Store, Unmoved, Write
from scheduler.commit import Committer, plan_changes
from scheduler.cycle import Cycle
from scheduler.placement.snapshot import add, share_of
from tests.integration.scheduler.parts import HANG_S, Decider, running
from tests.unit.scheduler.build import (
    NOW_MS,
    ROOMY,
    assignment,
    host,
    host_puts,
    planned,
    record,
    record_puts,
    sandbox_id,
    status,
    status_put,
)

THREE_PLACES = replace(ROOMY, sandboxes=3)


async def put_all(store: Store, writes: list[Put]) -> int:
    """Writes in transactions as large as they may be; the last revision."""
    revision = 0
    for start in range(0, len(writes), TRANSACTION_OPS_MAX):
        revision = (await store.transact([], writes[start : start + TRANSACTION_OPS_MAX])).revision
    return revision


async def assignments_in(store: Store) -> list[Assignment]:
    return [decode(Assignment, entry.value) for entry in (await store.list_prefix(ASSIGNMENTS)).entries]


async def until_keys(store: Store, decider: Decider, prefix: str, count: int) -> None:
    """Waits until there are `count` keys under `prefix`."""
    async with asyncio.timeout(HANG_S):
        while True:
            changed = decider.mirror.changed()
            if len((await store.list_prefix(prefix)).entries) == count:
                return
            await changed.wait()


async def look(decider: Decider, revision: int) -> None:
    """One look once the decider has seen `revision`."""
    await decider.mirror.wait_for(revision, HANG_S)
    await decider.cycle.look()


async def test_a_pending_sandbox_is_placed(store: Store, decider: Decider) -> None:
    """One look writes assignment and reservation, and the next has nothing to do."""
    await look(decider, await put_all(store, [*host_puts(host()), *record_puts(record())]))
    (order,) = await assignments_in(store)
    assert order == assignment(record(), host(), cycle=order.cycle)
    told = await store.get(cycle_key(order.cycle))
    assert told is not None
    assert [one.sandbox_id for one in decode(CycleRecord, told.value).decisions] == [order.sandbox_id]
    found = await store.get(reservation_key(host().host_id))
    assert found is not None
    assert decode(Reservation, found.value) == share_of(order)
    revision = decider.mirror.revision
    await look(decider, revision)
    assert (await store.list_prefix(ROOT)).revision == revision


async def test_a_refusal_is_written_once(store: Store, decider: Decider) -> None:
    """A refusal that says nothing new is not written again, though time passes; news is written; a host ends it."""
    await look(decider, await put_all(store, record_puts(record())))
    first = await store.get(refusal_key(record().sandbox_id))
    assert first is not None
    assert [reason.code for reason in decode(Refusal, first.value).reasons] == ["no_hosts"]
    decider.now_ms += 60_000
    await look(decider, decider.mirror.revision)
    assert await store.get(refusal_key(record().sandbox_id)) == first
    await look(decider, await put_all(store, host_puts(host(images=()))))
    second = await store.get(refusal_key(record().sandbox_id))
    assert second is not None
    assert [reason.code for reason in decode(Refusal, second.value).reasons] == ["image_unknown"]
    await look(decider, await put_all(store, host_puts(host())))
    assert await store.get(refusal_key(record().sandbox_id)) is None
    assert [one.sandbox_id for one in await assignments_in(store)] == [record().sandbox_id]


async def test_room_is_used_as_soon_as_it_is_free(store: Store, decider: Decider) -> None:
    """When a host releases a sandbox, its reservation shrinks and the next pending one is placed, all in one look."""
    small = host(capacity=replace(ROOMY, sandboxes=1))
    await look(decider, await put_all(store, [*host_puts(small), *record_puts(record(0)), *record_puts(record(1))]))
    assert [one.sandbox_id for one in await assignments_in(store)] == [sandbox_id(0)]
    done = status(assignment(record(0), small), Phase.COMPLETED, released=True)
    await look(decider, await put_all(store, [status_put(done)]))
    assert {one.sandbox_id for one in await assignments_in(store)} == {sandbox_id(0), sandbox_id(1)}
    found = await store.get(reservation_key(small.host_id))
    assert found is not None
    assert decode(Reservation, found.value).sandboxes == 1


async def test_a_sandbox_is_removed_without_a_trace(store: Store, decider: Decider) -> None:
    """Goal, order, the host's answer: then every key is gone, and a tombstone under a lease keeps the id taken."""
    await look(decider, await put_all(store, [*host_puts(host()), *record_puts(record())]))
    wish = replace(record(), goal=Goal.REMOVE, generation=2)
    await look(decider, await put_all(store, record_puts(wish)[:1]))
    (order,) = await assignments_in(store)
    assert (order.goal, order.generation) == (Goal.REMOVE, 2)
    gone = status_put(status(order, Phase.REMOVED, released=True))
    await look(decider, await put_all(store, [gone]))
    assert (await assignments_in(store), bool((await store.list_prefix(RECORDS)).entries)) == ([], True)
    # Only when the host has forgotten it as well is it gone.
    await look(decider, await put_all(store, [Delete(gone.key)]))
    left = {entry.key.removeprefix(ROOT).split("/")[0] for entry in (await store.list_prefix(ROOT)).entries}
    # What its tenant has used stays with the tenant.
    assert left == {"host", "alive", "leader", "reservation", "balance", "tombstone"}
    (tombstone,) = (await store.list_prefix(TOMBSTONES)).entries
    assert tombstone.lease_id != 0
    found = await store.get(reservation_key(host().host_id))
    assert found is not None
    assert decode(Reservation, found.value) == Reservation(host().host_id)


async def test_destroyed_ids_share_a_lease(store: Store, decider: Decider) -> None:
    """A thousand removals in an hour take one lease; the next hour's take another, so that each id stays taken long enough."""
    wishes = [replace(record(number), goal=Goal.REMOVE, generation=2) for number in range(3)]
    await look(decider, await put_all(store, [*record_puts(wishes[0]), *record_puts(wishes[1])]))
    decider.clock_s += 3600.0
    await look(decider, await put_all(store, record_puts(wishes[2])))
    first, second, third = (entry.lease_id for entry in (await store.list_prefix(TOMBSTONES)).entries)
    assert first == second != third


async def test_a_lost_tombstone_lease_is_replaced(store: Store, decider: Decider) -> None:
    """When the lease of destroyed ids has ended before its time, the look fails and the next one takes a new lease."""
    wishes = [replace(record(number), goal=Goal.REMOVE, generation=2) for number in range(2)]
    await look(decider, await put_all(store, record_puts(wishes[0])))
    (tombstone,) = (await store.list_prefix(TOMBSTONES)).entries
    await store.revoke_lease(tombstone.lease_id)
    revision = await put_all(store, record_puts(wishes[1]))
    async with running(decider.cycle.run()):
        await decider.mirror.wait_for(revision, HANG_S)
        await until_keys(store, decider, RECORDS, 0)


async def test_what_nobody_foresaw_costs_one_look(store: Store, decider: Decider) -> None:
    """An error that is none of ours ends no scheduler: the loop looks again, and places what waits."""
    faults = iter([RuntimeError("a value that nobody foresaw")])

    def fence() -> Unmoved:
        for fault in faults:
            raise fault
        return decider.fence

    revision = await put_all(store, [*host_puts(host()), *record_puts(record())])
    await decider.mirror.wait_for(revision, HANG_S)
    cycle = Cycle(store, decider.state, fence, lambda: NOW_MS, interval_s=0.2)
    async with running(cycle.run()):
        await until_keys(store, decider, ASSIGNMENTS, 1)
    assert next(faults, None) is None


async def test_reservations_are_repaired(store: Store, decider: Decider) -> None:
    """A reservation that says too much or too little becomes the sum of the host's assignments."""
    wrong = Reservation(host().host_id, 8, 8192, 8192, 8)
    orphan = Put(reservation_key(HostId("away")), encode(Reservation(HostId("away"), 1, 1, 1, 1)))
    stored = Put(reservation_key(host().host_id), encode(wrong))
    await look(decider, await put_all(store, [*host_puts(host()), *record_puts(record()), stored, orphan]))
    entries = (await store.list_prefix(RESERVATIONS)).entries
    assert [decode(Reservation, entry.value) for entry in entries] == [
        Reservation(HostId("away")),
        share_of(assignment(record(), host())),
    ]


async def test_many_are_placed_in_groups(store: Store, decider: Decider) -> None:
    """More than one transaction can hold are placed in one look, each host's reservation right at the end."""
    hosts = [host(name, capacity=Capacity(400, 400_000, 400_000, 60)) for name in ("a", "b")]
    writes = [put for one in hosts for put in host_puts(one)]
    writes += [put for number in range(100) for put in record_puts(record(number))]
    await look(decider, await put_all(store, writes))
    placed = await assignments_in(store)
    assert len(placed) == 100
    assert await reservations_add_up(store)


async def test_a_group_that_was_outrun_writes_nothing(store: Store, decider: Decider, fence: Unmoved) -> None:
    """Two plans made on one snapshot: the first commits, the second writes nothing, even where it chose another host."""
    writes = [*host_puts(host("one")), *host_puts(host("two")), *record_puts(record())]
    await decider.mirror.wait_for(await put_all(store, writes), HANG_S)
    seen = decider.state.snapshot()
    committer = Committer(store, lambda: 0.0)
    views = [replace(seen, alive=frozenset([HostId(name)])) for name in ("one", "two")]
    plans = [list(plan_changes(only, planned(only, NOW_MS))) for only in views]
    outcomes = []
    for changes in plans:
        outcomes.append((await committer.commit(fence, changes)).is_committed)
    assert outcomes == [True, False]
    assert [one.host_id for one in await assignments_in(store)] == ["one"]


@pytest.mark.parametrize("moved", ["record", "leader", "reservation", "cordon"])
async def test_nothing_is_written_on_what_has_moved(store: Store, decider: Decider, fence: Unmoved, moved: str) -> None:
    """A changed wish, a new leader, another placement on the host or its cordon each void a plan that has not seen them."""
    await decider.mirror.wait_for(await put_all(store, [*host_puts(host()), *record_puts(record())]), HANG_S)
    seen = decider.state.snapshot()
    write = {
        "record": record_puts(replace(record(), goal=Goal.STOP, generation=2))[0],
        "leader": Put(LEADER, b"two"),
        "reservation": Put(reservation_key(host().host_id), encode(Reservation(host().host_id))),
        "cordon": Put(cordon_key(host().host_id), encode(HostCordon(host().host_id, "ops", NOW_MS))),
    }[moved]
    changes = list(plan_changes(seen, planned(seen, NOW_MS)))
    await put_all(store, [write])
    outcome = await Committer(store, lambda: 0.0).commit(fence, changes)
    assert not outcome.is_committed
    assert await assignments_in(store) == []


@pytest.mark.parametrize(
    "value", [encode(HostCordon(host().host_id, "ops", NOW_MS)), b"\xff"], ids=["whole", "unreadable"]
)
async def test_a_cordoned_host_takes_nothing_new(store: Store, decider: Decider, value: bytes) -> None:
    """What is on it runs on, what waits is told by count, and is placed once the cordon goes; also one that cannot be read."""
    placed, waiting = record(0), record(1)
    await look(decider, await put_all(store, [*host_puts(host()), *record_puts(placed)]))
    before = await assignments_in(store)
    await look(decider, await put_all(store, [Put(cordon_key(host().host_id), value), *record_puts(waiting)]))
    assert await assignments_in(store) == before
    refusal = await store.get(refusal_key(waiting.sandbox_id))
    assert refusal is not None
    assert [(one.code, one.hosts) for one in decode(Refusal, refusal.value).reasons] == [("cordoned", 1)]
    await look(decider, (await store.transact([], [Delete(cordon_key(host().host_id))])).revision)
    assert {one.sandbox_id for one in await assignments_in(store)} == {placed.sandbox_id, waiting.sandbox_id}


async def test_rivals_never_place_twice(store: Store, fence: Unmoved) -> None:
    """Three schedulers that all believe to lead place 30 sandboxes on 9 places: each once, no host beyond its room."""
    hosts = [host(name, capacity=THREE_PLACES) for name in ("a", "b", "c")]
    rivals = [Decider(store, fence) for _ in range(3)]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(*(one.mirror.run() for one in rivals)))
        await stack.enter_async_context(running(*(one.cycle.run() for one in rivals)))
        await put_all(store, [put for one in hosts for put in host_puts(one)])
        for number in range(30):
            await put_all(store, record_puts(record(number)))
        await until_keys(store, rivals[0], ASSIGNMENTS, 9)
    placed = await assignments_in(store)
    assert len({one.sandbox_id for one in placed}) == len(placed) == 9
    assert sorted(one.host_id for one in placed) == sorted("abc" * 3)
    assert await reservations_add_up(store)


async def test_unreadable_values_stop_nothing(store: Store, decider: Decider) -> None:
    """What cannot be decoded is left out: the sandbox behind it is neither placed nor removed, all others go on."""
    opaque = record(0)
    order = assignment(opaque, host())
    junk: list[Write] = [
        Put(record_key(opaque.tenant, opaque.sandbox_id), b"\xff\xff"),
        Put(assignment_key(host().host_id, opaque.sandbox_id), encode(order)),
        Put(host_key(HostId("junk")), b"\xff"),
        Put(alive_key(HostId("junk")), b"\xff"),
        Put(ROOT + "record/strange", b"\xff"),
        Put(ROOT + "unheard-of/a/b/c", b"\xff"),
    ]
    await store.transact([], junk)
    await look(decider, await put_all(store, [*host_puts(host()), *record_puts(record(1))]))
    assert {one.sandbox_id: one.goal for one in await assignments_in(store)} == {
        opaque.sandbox_id: Goal.RUN,
        sandbox_id(1): Goal.RUN,
    }


async def test_who_does_not_lead_writes_nothing(store: Store) -> None:
    """Without the leader's key as it expects it, a scheduler's looks leave the store as it is."""
    deposed = Decider(store, Unmoved(LEADER, 1))
    async with running(deposed.mirror.run()):
        await look(deposed, await put_all(store, [*host_puts(host()), *record_puts(record())]))
    assert await assignments_in(store) == []


async def test_the_loop_outlives_the_store(memory: MemoryStore) -> None:
    """While the store is away looks fail; when it is back the loop goes on by itself."""
    committed = await memory.transact([], [Put(LEADER, b"one")])
    decider = Decider(memory, Unmoved(LEADER, committed.revision))
    memory.is_reachable = False
    async with running(decider.mirror.run(), decider.cycle.run()):
        with pytest.raises(UnavailableError):
            decider.state.fresh()
        memory.is_reachable = True
        await put_all(memory, [*host_puts(host()), *record_puts(record())])
        await until_keys(memory, decider, ASSIGNMENTS, 1)


async def reservations_add_up(store: Store) -> bool:
    """Whether each reservation is the sum of the assignments to its host."""
    sums: dict[HostId, Reservation] = {}
    for order in await assignments_in(store):
        sums[order.host_id] = add(sums.get(order.host_id, Reservation(order.host_id)), share_of(order))
    entries = (await store.list_prefix(RESERVATIONS)).entries
    return {one.host_id: one for one in (decode(Reservation, entry.value) for entry in entries)} == sums
