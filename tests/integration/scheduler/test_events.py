"""Events from the store and from hosts as one stream: each once, in order, also of what was removed or was away for a while."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from bedplate.sandbox.v1 import event_pb2, event_pb2_grpc, sandbox_pb2, service_pb2
from fleet.codec import encode, to_message
from fleet.errors import BedplateError, NotFoundError, UnavailableError
from fleet.identity import Role
from fleet.model.event import Event
from fleet.model.sandbox import Phase, SandboxStatus
from fleet.rpc import error_from_call
from fleet.store.keyspace import EVENTS, assignment_key, events_of, status_key
from fleet.store.memory import MemoryStore
from fleet.store.port import Delete, Put, Store, Unmoved
from tests.integration.scheduler.far import FarHost
from tests.integration.scheduler.parts import HANG_S, Client, Fleet
from tests.unit.scheduler.build import DEMO, OTHER, record, sandbox_id, spec

ID = sandbox_id(0)
NAMED = service_pb2.GetSandboxRequest(sandbox=ID)


@pytest.fixture
async def far(store: Store, pki: Path, tmp_path: Path) -> AsyncIterator[FarHost]:
    host = FarHost(store, pki, tmp_path / "far")
    async with host.running():
        yield host


@pytest.fixture
async def demo(fleet: Fleet, far: FarHost) -> Client:
    """The tenant `demo`, once the scheduler knows the host."""
    await fleet.knows(far.host_id)
    return fleet.client(Role.TENANT, "demo")


async def create(client: Client, number: int = 0, **changes: Any) -> None:
    message = to_message(spec(number, **changes))
    await client.sandboxes.CreateSandbox(service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id(number), spec=message))


async def until_assigned(client: Client, sandbox: str = ID) -> None:
    async with asyncio.timeout(HANG_S):
        watch = client.sandboxes.WatchSandbox(service_pb2.GetSandboxRequest(sandbox=sandbox))
        async for seen in watch:
            if seen.host_id:
                break
        watch.cancel()


def reading(client: Client, sandbox: str = "box-0", **values: Any) -> Any:
    stub: Any = event_pb2_grpc.EventServiceStub(client.channel)
    return stub.ReadEvents(event_pb2.ReadEventsRequest(sandbox=sandbox, **values))


async def there(client: Client, sandbox: str = "box-0", **values: Any) -> list[Any]:
    async with asyncio.timeout(HANG_S):
        return [event async for event in reading(client, sandbox, **values)]


async def refusal_of(call: Any) -> BedplateError:
    """The error that a stream must end with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return error_from_call(caught.value, "scheduler")


async def heard(call: Any, kind: str) -> list[Any]:
    """What a follow says up to an event of that kind."""
    events = []
    async with asyncio.timeout(HANG_S):
        async for event in call:
            events.append(event)
            if event.kind == kind:
                return events
    raise AssertionError(f"it ended before {kind}")


def of_host(seq: int, at_ms: int, kind: str = "agent.phase_changed", **changes: Any) -> Event:
    made = Event(ID, DEMO, "host/far", seq, at_ms, "guest", kind)
    return replace(made, **changes)


async def remove(store: Store, far: FarHost, client: Client) -> None:
    """Destroys the sandbox, and the host says that it is gone and forgets it."""
    await client.sandboxes.DestroySandbox(NAMED)
    key, order = status_key(far.host_id, ID), assignment_key(far.host_id, ID)
    async with asyncio.timeout(HANG_S):
        for generation in range(2, 9):
            gone = SandboxStatus(ID, far.host_id, generation, Phase.REMOVED, released=True)
            await store.transact([], [Put(key, encode(gone))])
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    while await store.get(order) is not None:  # noqa: ASYNC110 (seen through the store alone)
                        await asyncio.sleep(0.02)
            if await store.get(order) is None:
                break
        await store.transact([], [Delete(key)])
        async for _ in client.sandboxes.WatchSandbox(NAMED):
            pass


async def test_a_life_is_told(demo: Client, fleet: Fleet, far: FarHost, store: Store) -> None:
    """Creation, placement, an operator's stop, removal: who, why, before and after; numbers rise; then it is kept under a lease,
    readable by id when name and record are gone."""
    await create(demo)
    await until_assigned(demo)
    operator = fleet.client(Role.OPERATOR, "operator")
    await operator.sandboxes.StopSandbox(service_pb2.GetSandboxRequest(sandbox=ID))
    before = await there(demo)
    assert [(one.kind, one.actor) for one in before] == [
        ("sandbox.created", "tenant/demo"),
        ("sandbox.assigned", "scheduler"),
        ("sandbox.goal_changed", "operator/operator"),
    ]
    await remove(store, far, demo)
    events = await there(demo, ID)
    assert events[:3] == before
    assert [one.kind for one in events[3:]] == ["sandbox.goal_changed", "sandbox.removed"]
    assert sorted(one.seq for one in events) == [one.seq for one in events]
    assert (await refusal_of(reading(demo, "box-0"))).code == "sandbox_unknown"
    entries = (await store.list_prefix(EVENTS)).entries
    assert len(entries) == 5
    if isinstance(store, MemoryStore):
        assert len({entry.lease_id for entry in entries} - {0}) == 1


async def test_a_strangers_events_are_as_unknown_as_none(demo: Client, fleet: Fleet, far: FarHost) -> None:
    """Neither store nor host tells another tenant anything, by id or in the whole; an operator names the tenant."""
    await create(demo)
    await far.tell(of_host(1, 5))
    other, operator = fleet.client(Role.TENANT, "other"), fleet.client(Role.OPERATOR, "operator")
    error = await refusal_of(reading(other, ID))
    assert (type(error), error.code) == (NotFoundError, "sandbox_unknown")
    assert (await refusal_of(reading(other, ID, follow=True))).code == "sandbox_unknown"
    assert (await refusal_of(reading(demo, sandbox_id(9)))).code == "sandbox_unknown"
    assert await there(other, "") == []
    assert (await refusal_of(reading(operator, ""))).code == "tenant_missing"
    assert {one.sandbox_id for one in await there(operator, "", tenant="demo")} == {ID}


async def test_both_sides_are_merged_by_time(demo: Client, far: FarHost) -> None:
    """The store's and the host's are one list in the order of time; what a host says of others' or as another is left out."""
    await create(demo)
    await until_assigned(demo)
    created, assigned = await there(demo)
    await far.tell(
        of_host(1, created.at_ms - 10),
        of_host(2, assigned.at_ms + 10),
        of_host(3, assigned.at_ms, tenant=OTHER),
        of_host(4, assigned.at_ms, sandbox_id=sandbox_id(7)),
        of_host(5, assigned.at_ms, origin="scheduler"),
        of_host(6, assigned.at_ms, origin="host/near"),
    )
    merged = await there(demo)
    assert [(one.origin, one.seq) for one in merged] == [
        ("host/far", 1),
        ("scheduler", created.seq),
        ("scheduler", assigned.seq),
        ("host/far", 2),
    ]
    late = await there(demo, since_ms=assigned.at_ms + 1)
    assert [one.seq for one in late] == [2]


async def test_a_follow_tells_each_event_once(demo: Client, far: FarHost, store: Store) -> None:
    """From before the placement to the removal, over a host that goes away and comes back: nothing twice, nothing left out, and
    what the host recorded before the end comes before the end."""
    far.gate.set()
    await create(demo)
    call = reading(demo, ID, follow=True)
    reader = asyncio.create_task(heard(call, "sandbox.assigned"))
    events = await reader
    await far.tell(of_host(1, 10), of_host(2, 20))
    events += await heard(call, "agent.phase_changed")
    await far.stop()
    await far.tell(of_host(3, 30, "away"))
    await far.start()
    events += await heard(call, "away")
    await far.tell(of_host(4, 40, "sandbox.phase_changed"))
    await remove(store, far, demo)
    await far.tell(of_host(5, 50, "last"))
    async with asyncio.timeout(HANG_S):
        events += [event async for event in call]
    names = [(one.origin, one.seq) for one in events]
    assert len(set(names)) == len(names)
    assert [seq for origin, seq in names if origin == "host/far"][:4] == [1, 2, 3, 4]
    assert events[-1].kind == "sandbox.removed"
    assert [one.kind for one in events if one.origin == "scheduler"] == [
        "sandbox.created",
        "sandbox.assigned",
        "sandbox.goal_changed",
        "sandbox.removed",
    ]


async def test_a_tenants_follow_hears_of_new_sandboxes(demo: Client, far: FarHost) -> None:
    """Without a name, everything of the tenant comes, on any host, from when it happens."""
    call = reading(demo, "", follow=True)
    await create(demo)
    events = await heard(call, "sandbox.assigned")
    await far.tell(of_host(1, 10, "first"))
    events += await heard(call, "first")
    await create(demo, 1)
    events += await heard(call, "sandbox.assigned")
    assert {one.sandbox_id for one in events} == {ID, sandbox_id(1)}
    call.cancel()


async def test_a_refusal_is_told_once(demo: Client) -> None:
    """While nothing new is said of a sandbox that fits nowhere, nothing is told."""
    await create(demo, image=replace(spec().image, name="nowhere:1"))
    call = reading(demo, ID, follow=True)
    events = await heard(call, "sandbox.refused")
    assert events[-1].cause.startswith("image")
    await demo.sandboxes.StopSandbox(NAMED)
    assert [one.kind for one in await heard(call, "sandbox.goal_changed")] == ["sandbox.goal_changed"]
    call.cancel()


class Deaf(MemoryStore):
    """A store in which events cannot be read."""

    is_deaf = False

    async def list_prefix(self, prefix: str) -> Any:
        if self.is_deaf and prefix.startswith(EVENTS):
            raise UnavailableError("store_unavailable", "the store is away", "try again")
        return await super().list_prefix(prefix)


async def test_what_can_be_read_is_told(pki: Path, tmp_path: Path) -> None:
    """A host that is away leaves the store's, a store that is away leaves the host's; only without both is it an error."""
    store = Deaf(asyncio.get_running_loop().time)
    far = FarHost(store, pki, tmp_path / "far")
    async with far.running(), Fleet(store, pki).running() as fleet:
        await fleet.knows(far.host_id)
        demo = fleet.client(Role.TENANT, "demo")
        await create(demo)
        await until_assigned(demo)
        await far.tell(of_host(1, 10))
        store.is_deaf = True
        assert [one.origin for one in await there(demo)] == ["host/far"]
        await far.stop()
        error = await refusal_of(reading(demo))
        assert (type(error), error.code) == (UnavailableError, "store_unavailable")
        store.is_deaf = False
        assert {one.origin for one in await there(demo)} == {"scheduler"}


async def test_a_lost_race_tells_nothing(demo: Client, store: Store) -> None:
    """An event is written with its transition or not at all: what did not happen was not told."""
    await asyncio.gather(*(demo.sandboxes.CreateSandbox(make_request()) for _ in range(5)))
    stops = [demo.sandboxes.StopSandbox(NAMED) for _ in range(5)]
    assert {one.goal for one in await asyncio.gather(*stops)} == {sandbox_pb2.GOAL_STOP}
    keys = [entry.key.rsplit("-", 1)[-1] for entry in (await store.list_prefix(events_of(DEMO, ID))).entries]
    assert (keys.count("created"), keys.count("goal")) == (1, 1)
    refused = await store.transact([Unmoved("/absent", 1)], [Put(events_of(DEMO, ID) + "x", b"")])
    assert not refused.is_committed


def make_request() -> Any:
    return service_pb2.CreateSandboxRequest(sandbox_id=ID, spec=to_message(record().spec))
