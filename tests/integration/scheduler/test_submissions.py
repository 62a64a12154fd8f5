"""Creations on the scheduler that leads: accepted and placed in one transaction, refused with a record, and never lost."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from bedplate.sandbox.v1 import service_pb2
from fleet.codec import decode, to_message
from fleet.errors import ExhaustedError, InvalidSpecError
from fleet.identity import Role
from fleet.model.assignment import Assignment
from fleet.model.host import Capacity
from fleet.model.sandbox import Resources, SandboxRecord
from fleet.rpc import error_from_call
from fleet.store.keyspace import ASSIGNMENTS, LEADER, RECORDS, events_of, id_key, name_key, record_key, refusal_key
from fleet.store.memory import MemoryStore
from fleet.store.port import Put, Store, Unmoved
from scheduler.api.creations import CREATIONS_MAX
from tests.integration.scheduler.parts import HANG_S, SUBMISSIONS_MAX, Client, Decider, Fleet, running
from tests.unit.scheduler.build import DEMO, host, host_puts, record, record_puts, sandbox_id, spec

ACTOR = "tenant/demo"
WIDE = host(capacity=Capacity(400, 400_000, 400_000, 400))


@pytest.fixture
async def decider(store: Store) -> AsyncIterator[Decider]:
    """A scheduler that leads and follows the store; a test tells it when to look."""
    committed = await store.transact([], [Put(LEADER, b"one"), *host_puts(WIDE)])
    made = Decider(store, Unmoved(LEADER, committed.revision))
    async with running(made.mirror.run()):
        await made.mirror.wait_for(committed.revision, HANG_S)
        yield made


def creations(*numbers: int, **changes: Any) -> Any:
    """The request for many sandboxes."""
    wanted = [
        service_pb2.Creation(sandbox_id=sandbox_id(number), spec=to_message(spec(number, **changes)))
        for number in numbers
    ]
    return service_pb2.CreateSandboxesRequest(creations=wanted)


async def test_a_creation_is_placed_in_one_transaction(store: Store, decider: Decider) -> None:
    """Record, id, name, assignment and both events are of one revision: nobody ever sees the one without the other."""
    offered = [decider.submissions.offer(record(number), ACTOR) for number in range(5)]
    await decider.cycle.look()
    for number, one in enumerate(offered):
        revision = one.answer.result()
        keys = (record_key(DEMO, sandbox_id(number)), id_key(sandbox_id(number)), name_key(DEMO, f"box-{number}"))
        entries = [await store.get(key) for key in keys]
        entries += [*(await store.list_prefix(events_of(DEMO, sandbox_id(number)))).entries]
        assert [entry.mod_revision if entry else 0 for entry in entries] == [revision] * 5
    orders = [decode(Assignment, entry.value) for entry in (await store.list_prefix(ASSIGNMENTS)).entries]
    assert [one.sandbox_id for one in orders] == [sandbox_id(number) for number in range(5)]


async def test_a_creation_that_fits_nowhere_is_kept_with_its_refusal(store: Store, decider: Decider) -> None:
    """It is acknowledged, waits as any pending sandbox, and is placed once there is room."""
    wish = record(0, spec=spec(0, resources=Resources(vcpus=500, memory_mib=512, disk_mib=1024)))
    offered = decider.submissions.offer(wish, ACTOR)
    await decider.cycle.look()
    refusal = await store.get(refusal_key(wish.sandbox_id))
    assert refusal is not None
    assert refusal.mod_revision == offered.answer.result()
    committed = await store.transact([], host_puts(replace(WIDE, capacity=Capacity(1000, 400_000, 400_000, 400))))
    await decider.mirror.wait_for(committed.revision, HANG_S)
    await decider.cycle.look()
    assert len((await store.list_prefix(ASSIGNMENTS)).entries) == 1


@pytest.mark.parametrize("rival", ["id", "name", "tombstone"])
async def test_what_is_there_is_never_taken(store: Store, decider: Decider, rival: str) -> None:
    """An id or a name that another writer takes while the plan is made: nothing of the group is written, and it is told."""
    offered = decider.submissions.offer(record(0), ACTOR)
    other = replace(record(0), spec=spec(7)) if rival == "id" else replace(record(9), spec=spec(0))
    tombstone = [Put("/bedplate/v1/tombstone/" + sandbox_id(0), b"demo")]
    # The mirror does not see it before the plan: the look runs to its transaction without yielding to it.
    await store.transact([], tombstone if rival == "tombstone" else record_puts(other))
    async with asyncio.timeout(HANG_S):
        while not offered.answer.done():
            await decider.cycle.look()
    assert offered.answer.result() is None
    found = await store.get(record_key(DEMO, sandbox_id(0)))
    assert (found is not None and decode(SandboxRecord, found.value).spec.name == "box-7") is (rival == "id")
    named = await store.get(name_key(DEMO, "box-0"))
    assert (named.value if named else b"") == (sandbox_id(9).encode() if rival == "name" else b"")


async def test_a_lost_race_loses_no_creation(store: Store, decider: Decider) -> None:
    """Of a plan of many groups one loses, again and again: its creations are told so, and all others are placed."""
    offered = [decider.submissions.offer(record(number), ACTOR) for number in range(60)]
    await store.transact([], [Put(id_key(sandbox_id(30)), b"other")])
    async with asyncio.timeout(HANG_S):
        while not all(one.answer.done() for one in offered):
            await decider.cycle.look()
    outcomes = [one.answer.result() for one in offered]
    assert outcomes[30] is None
    placed = {number for number, one in enumerate(outcomes) if one is not None}
    assert len(placed) >= 60 // 2
    stored = {decode(SandboxRecord, one.value).sandbox_id for one in (await store.list_prefix(RECORDS)).entries}
    assert stored == {sandbox_id(number) for number in placed}


async def test_a_full_queue_says_so(decider: Decider) -> None:
    """Past its limit a creation is refused at once, with the limit's name; those in it are placed."""
    offered = [decider.submissions.offer(record(number), ACTOR) for number in range(SUBMISSIONS_MAX)]
    with pytest.raises(ExhaustedError, match="submissions_max") as caught:
        decider.submissions.offer(record(SUBMISSIONS_MAX), ACTOR)
    assert (caught.value.code, bool(caught.value.next_step)) == ("submissions_exhausted", True)
    async with asyncio.timeout(HANG_S):
        while not all(one.answer.done() for one in offered):
            await decider.cycle.look()
    assert None not in {one.answer.result() for one in offered}


async def test_a_store_that_fails_is_told(memory: MemoryStore) -> None:
    """Whether it was written is not known then: the client hears that it is to ask again, and the same id is safe."""
    committed = await memory.transact([], [Put(LEADER, b"one"), *host_puts(WIDE)])
    made = Decider(memory, Unmoved(LEADER, committed.revision))
    async with running(made.mirror.run()):
        await made.mirror.wait_for(committed.revision, HANG_S)
        await made.cycle.look()
        offered = made.submissions.offer(record(0), ACTOR)
        memory.is_reachable = False
        with pytest.raises(Exception, match="away"):
            await made.cycle.look()
        assert not offered.answer.done() or offered.answer.exception() is not None


@pytest.fixture
async def demo(fleet: Fleet) -> Client:
    """The tenant `demo`, once the scheduler answers."""
    await fleet.answers()
    return fleet.client(Role.TENANT, "demo")


async def test_many_are_created_in_one_call(demo: Client, store: Store) -> None:
    """Each is answered on its own and in order; the same call again gives the same sandboxes; one that is wrong fails alone."""
    await store.transact([], host_puts(WIDE))
    wanted = creations(*range(40))
    wanted.creations[7].spec.resources.vcpus = 0
    first = (await demo.sandboxes.CreateSandboxes(wanted)).results
    assert [one.sandbox.sandbox_id for one in first] == [
        "" if number == 7 else sandbox_id(number) for number in range(40)
    ]
    assert (first[7].error.status, first[7].error.field) == ("INVALID_ARGUMENT", "resources.vcpus")
    again = (await demo.sandboxes.CreateSandboxes(wanted)).results
    assert [one.sandbox.created_at_ms for one in again] == [one.sandbox.created_at_ms for one in first]
    twisted = creations(0)
    twisted.creations[0].spec.name = "another"
    (result,) = (await demo.sandboxes.CreateSandboxes(twisted)).results
    assert (result.error.status, result.error.code) == ("ALREADY_EXISTS", "id_reused")


async def test_more_than_a_call_may_create_is_refused(demo: Client) -> None:
    """Before anything is written, with what to do instead."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await demo.sandboxes.CreateSandboxes(creations(*range(CREATIONS_MAX + 1)))
    error = error_from_call(caught.value, "scheduler")
    assert (type(error), error.code) == (InvalidSpecError, "creations_too_many")


async def test_a_burst_past_the_limit_is_refused_by_name(demo: Client) -> None:
    """RESOURCE_EXHAUSTED names the limit; what was created before it stays, and nothing is lost without a word."""
    results = []
    for start in range(0, 600, 200):
        results += (await demo.sandboxes.CreateSandboxes(creations(*range(start, start + 200)))).results
    refused = [one.error for one in results if one.HasField("error")]
    assert {(one.status, one.code, "limits.writes_per_s" in one.message) for one in refused} == {
        ("RESOURCE_EXHAUSTED", "calls_exhausted", True)
    }
    listed = await demo.sandboxes.ListSandboxes(service_pb2.ListSandboxesRequest())
    assert {one.sandbox_id for one in listed.sandboxes} == {
        one.sandbox.sandbox_id for one in results if one.HasField("sandbox")
    }
