"""Stop and start: what a sandbox keeps in between, what no lost answer, no race and no deposed leader can make of it."""

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import pytest

from bedplate.sandbox.v1 import sandbox_pb2, service_pb2
from fleet.codec import decode, encode, to_message
from fleet.errors import BedplateError, ConflictError
from fleet.identity import Role
from fleet.model.assignment import Assignment
from fleet.model.host import Reservation
from fleet.model.sandbox import Goal, Phase, SandboxRecord
from fleet.rpc import error_from_call
from fleet.store.keyspace import ASSIGNMENTS, LEADER, RECORDS, assignment_key, record_key, reservation_key
from fleet.store.memory import MemoryStore
from fleet.store.port import Committed, Put, Store, Unmoved, Write
from scheduler.commit import Committer, plan_changes
from scheduler.placement.snapshot import share_of
from tests.integration.scheduler.parts import HANG_S, Client, Decider, Fleet, ObedientHost, running
from tests.unit.scheduler.build import (
    BASE,
    DEMO,
    NOW_MS,
    ROOMY,
    assignment,
    host,
    host_puts,
    planned,
    record,
    record_puts,
    sandbox_id,
    spec,
    status,
    status_put,
)

ID = sandbox_id(0)
NAMED = service_pb2.GetSandboxRequest(sandbox=ID)
PHASE = sandbox_pb2.Phase


async def refusal_of(call: Awaitable[Any]) -> BedplateError:
    """The error that a call must end with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_call(caught.value, "scheduler")


async def until_phase(demo: Client, phase: int, run: int = 1) -> Any:
    """The sandbox once it has that phase in that run."""
    watch = demo.sandboxes.WatchSandbox(NAMED)
    async with asyncio.timeout(HANG_S):
        async for seen in watch:
            if (seen.phase, seen.run) == (phase, run):
                watch.cancel()
                return seen
    raise AssertionError("the watch has ended")


@pytest.fixture
async def demo(fleet: Fleet, local: ObedientHost) -> Client:
    """The tenant `demo`, with one sandbox that runs."""
    await fleet.knows(local.host_id)
    client = fleet.client(Role.TENANT, "demo")
    await client.sandboxes.CreateSandbox(service_pb2.CreateSandboxRequest(sandbox_id=ID, spec=to_message(spec())))
    await local.ordered(ID)
    await local.start(ID)
    await until_phase(client, PHASE.PHASE_RUNNING)
    return client


async def test_a_stopped_sandbox_runs_again(demo: Client, local: ObedientHost) -> None:
    """Stop, start, twice over: the next run is ordered on the same host each time, with all that it needs set aside again."""
    for run in (1, 2):
        stopped = await demo.sandboxes.StopSandbox(NAMED)
        assert (stopped.goal, stopped.generation) == (sandbox_pb2.GOAL_STOP, 2 * run)
        await until_phase(demo, PHASE.PHASE_STOPPED, run)
        started = await demo.sandboxes.StartSandbox(NAMED)
        assert (started.goal, started.run, started.generation) == (sandbox_pb2.GOAL_RUN, run + 1, 2 * run + 1)
        seen = await until_phase(demo, PHASE.PHASE_STARTING, run + 1)
        assert seen.host_id == local.host_id
        order = local.orders.orders[ID]
        assert (order.goal, order.run, order.generation) == (Goal.RUN, run + 1, 2 * run + 1)
        await local.start(ID)
        await until_phase(demo, PHASE.PHASE_RUNNING, run + 1)


async def test_a_lost_answer_does_no_harm(demo: Client, store: Store) -> None:
    """Whoever asks again, because no answer came, changes nothing: one stop, one start, the same answer."""
    answers = await asyncio.gather(*(demo.sandboxes.StopSandbox(NAMED) for _ in range(6)))
    assert {(one.goal, one.generation) for one in answers} == {(sandbox_pb2.GOAL_STOP, 2)}
    await until_phase(demo, PHASE.PHASE_STOPPED)
    answers = await asyncio.gather(*(demo.sandboxes.StartSandbox(NAMED) for _ in range(6)))
    assert {(one.goal, one.generation, one.run) for one in answers} == {(sandbox_pb2.GOAL_RUN, 3, 2)}
    await until_phase(demo, PHASE.PHASE_STARTING, 2)
    assert (await demo.sandboxes.StartSandbox(NAMED)).run == 2


async def test_what_has_ended_is_not_stopped(demo: Client, local: ObedientHost, store: Store) -> None:
    """A stop of a completed sandbox writes nothing and shows it completed; a start of it says to run it anew."""
    await local.finish(ID, b"", BASE)
    await until_phase(demo, PHASE.PHASE_COMPLETED)
    before = await store.get(record_key(DEMO, ID))
    shown = await demo.sandboxes.StopSandbox(NAMED)
    assert (shown.phase, shown.goal, shown.generation) == (PHASE.PHASE_COMPLETED, sandbox_pb2.GOAL_RUN, 1)
    assert await store.get(record_key(DEMO, ID)) == before
    error = await refusal_of(demo.sandboxes.StartSandbox(NAMED))
    assert (type(error), error.code) == (ConflictError, "not_stopped")
    assert error.next_step.startswith("run it anew: mb destroy ")


async def test_a_running_sandbox_is_not_started(demo: Client) -> None:
    """Nor is it an error that looks like success: the answer says that it is not stopped."""
    assert (await refusal_of(demo.sandboxes.StartSandbox(NAMED))).code == "not_stopped"


class Outrun(MemoryStore):
    """A store in which `rival` is written just before the next change of a record."""

    rival: Put | None = None

    async def transact(self, conditions: Sequence[Unmoved], writes: Sequence[Write]) -> Committed:
        if self.rival is not None and any(write.key.startswith(RECORDS) for write in writes):
            rival, self.rival = self.rival, None
            await super().transact([], [rival])
        return await super().transact(conditions, writes)


async def test_an_end_that_outruns_a_stop_is_found(pki: Path) -> None:
    """A sandbox that completes between the look and the write of a stop is not stopped: the stop looks again."""
    store = Outrun(monotonic)
    order = assignment(record(), host())
    await store.transact([], [*host_puts(host()), *record_puts(record()), status_put(status(order))])
    await store.transact([], [Put(assignment_key(order.host_id, ID), encode(order))])
    async with Fleet(store, pki).running() as fleet:
        await fleet.knows(order.host_id)
        store.rival = status_put(status(order, Phase.COMPLETED, released=True))
        shown = await fleet.client(Role.TENANT, "demo").sandboxes.StopSandbox(NAMED)
    assert (shown.phase, shown.goal, store.rival) == (PHASE.PHASE_COMPLETED, sandbox_pb2.GOAL_RUN, None)
    found = await store.get(record_key(DEMO, ID))
    assert found is not None
    assert decode(SandboxRecord, found.value) == record()


STOPPED_ORDER = assignment(record(), host(), goal=Goal.STOP, generation=2)
STOPPED = status(STOPPED_ORDER, Phase.STOPPED, released=True)
AGAIN = record(generation=3, run=2)


def stopped_puts() -> list[Put]:
    """A host with a stopped sandbox, which is wanted to run again."""
    order = Put(assignment_key(STOPPED_ORDER.host_id, STOPPED_ORDER.sandbox_id), encode(STOPPED_ORDER))
    held = Put(reservation_key(host().host_id), encode(Reservation(host().host_id, 0, 0, 1024, 1)))
    return [*host_puts(host(capacity=replace(ROOMY, vcpus=1))), *record_puts(AGAIN), order, status_put(STOPPED), held]


async def only_order(store: Store) -> Assignment:
    (entry,) = (await store.list_prefix(ASSIGNMENTS)).entries
    return decode(Assignment, entry.value)


async def test_a_further_run_is_placed_once(store: Store, fence: Unmoved) -> None:
    """Two schedulers that decide on the same snapshot to run a sandbox again: one commits, the other writes nothing."""
    revision = (await store.transact([], stopped_puts())).revision
    decider = Decider(store, fence)
    async with running(decider.mirror.run()):
        await decider.mirror.wait_for(revision, HANG_S)
        seen = decider.state.snapshot()
    outcomes = []
    plans = [list(plan_changes(seen, planned(seen, now_ms))) for now_ms in (NOW_MS, NOW_MS + 1)]
    for changes in plans:
        outcomes.append((await Committer(store, lambda: 0.0).commit(fence, changes)).is_committed)
    assert outcomes == [True, False]
    order = await only_order(store)
    assert (order.run, order.assigned_at_ms) == (2, NOW_MS)
    found = await store.get(reservation_key(host().host_id))
    assert found is not None
    assert decode(Reservation, found.value) == share_of(order)


async def test_a_deposed_leader_runs_nothing_again(store: Store, fence: Unmoved) -> None:
    """A leader that does not know yet that it was deposed commits neither a further run nor a removal."""
    revision = (await store.transact([], [*stopped_puts(), Put(LEADER, b"two")])).revision
    deposed = Decider(store, fence)
    async with running(deposed.mirror.run()):
        await deposed.mirror.wait_for(revision, HANG_S)
        await deposed.cycle.look()
        assert await only_order(store) == STOPPED_ORDER
        gone = replace(AGAIN, goal=Goal.REMOVE, generation=4)
        await deposed.mirror.wait_for((await store.transact([], record_puts(gone)[:1])).revision, HANG_S)
        await deposed.cycle.look()
        assert await only_order(store) == STOPPED_ORDER


async def test_rivals_run_it_again_once(store: Store, fence: Unmoved) -> None:
    """Three schedulers that all believe to lead, two stopped sandboxes, vCPUs for one: the older runs, and never both."""
    younger = replace(AGAIN, sandbox_id=sandbox_id(1), spec=spec(1), created_at_ms=NOW_MS + 9)
    other = assignment(younger, host(), goal=Goal.STOP, generation=2, run=1)
    writes = [
        *stopped_puts(),
        *record_puts(younger),
        Put(assignment_key(host().host_id, other.sandbox_id), encode(other)),
        status_put(status(other, Phase.STOPPED, released=True)),
    ]
    rivals = [Decider(store, fence) for _ in range(3)]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(*(one.mirror.run() for one in rivals)))
        await stack.enter_async_context(running(*(one.cycle.run() for one in rivals)))
        await store.transact([], writes)
        async with asyncio.timeout(HANG_S):
            while True:
                changed = rivals[0].mirror.changed()
                if rivals[0].state.snapshot().refusals:
                    break
                await changed.wait()
    orders = [decode(Assignment, entry.value) for entry in (await store.list_prefix(ASSIGNMENTS)).entries]
    assert {(one.sandbox_id, one.run) for one in orders} == {(AGAIN.sandbox_id, 2), (younger.sandbox_id, 1)}
    found = await store.get(reservation_key(host().host_id))
    assert found is not None
    assert decode(Reservation, found.value) == Reservation(host().host_id, 1, 712, 2048, 2)
