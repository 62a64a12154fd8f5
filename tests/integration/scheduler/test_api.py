"""The API over mutual TLS: who may do what, what is answered, and what is said when it cannot be had."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bedplate.content.v1 import content_pb2
from bedplate.host.v1 import service_pb2 as host_pb2
from bedplate.sandbox.v1 import sandbox_pb2, service_pb2
from fleet.codec import to_message
from fleet.errors import (
    BedplateError,
    ConflictError,
    InvalidSpecError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
)
from fleet.identity import Role
from fleet.model.sandbox import Agent, Network, NetworkMode, Resources, SandboxSpec
from fleet.rpc import error_from_call
from fleet.store.keyspace import tombstone_key
from fleet.store.memory import MemoryStore
from fleet.store.port import Put, Store
from tests.integration.scheduler.parts import HANG_S, Client, Fleet, ObedientHost
from tests.unit.scheduler.build import sandbox_id, source, spec

ID = sandbox_id(0)
PHASE = sandbox_pb2.Phase


def create(number: int = 0, wanted: SandboxSpec | None = None, tenant: str = "") -> Any:
    """The request that creates a test's sandbox of that number."""
    message = to_message(wanted or spec(number))
    return service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id(number), spec=message, tenant=tenant)


def named(sandbox: str, tenant: str = "") -> Any:
    return service_pb2.GetSandboxRequest(sandbox=sandbox, tenant=tenant)


async def refusal_of(call: Awaitable[Any]) -> BedplateError:
    """The error that a call must end with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_call(caught.value, "scheduler")


async def next_phase(watch: Any, phase: int) -> Any:
    """The next view in a watch that has `phase`."""
    async with asyncio.timeout(HANG_S):
        async for seen in watch:
            if seen.phase == phase:
                return seen
    raise AssertionError("the watch has ended")


@pytest.fixture
async def demo(fleet: Fleet) -> Client:
    """The tenant `demo`, once the scheduler answers."""
    await fleet.answers()
    return fleet.client(Role.TENANT, "demo")


@pytest.fixture
def other(fleet: Fleet) -> Client:
    """Another tenant."""
    return fleet.client(Role.TENANT, "other")


@pytest.fixture
def operator(fleet: Fleet) -> Client:
    return fleet.client(Role.OPERATOR, "operator")


async def test_a_sandbox_lives_and_goes(demo: Client, local: ObedientHost, store: Store) -> None:
    """Create, placed, running, stop, destroy: a watch sees each, and ends with REMOVED; then its id is used up."""
    made = await demo.sandboxes.CreateSandbox(create())
    assert made.phase in (PHASE.PHASE_PENDING, PHASE.PHASE_ASSIGNED, PHASE.PHASE_STARTING)
    watch = demo.sandboxes.WatchSandbox(named("box-0"))
    seen = await next_phase(watch, PHASE.PHASE_STARTING)
    assert (seen.host_id, seen.status.host_id) == (local.host_id, local.host_id)
    await local.start(ID)
    await next_phase(watch, PHASE.PHASE_RUNNING)
    stopped = await demo.sandboxes.StopSandbox(named(ID))
    assert (stopped.goal, stopped.generation) == (sandbox_pb2.GOAL_STOP, 2)
    again = await demo.sandboxes.StopSandbox(named(ID))
    assert again.generation == 2
    destroyed = await demo.sandboxes.DestroySandbox(named(ID))
    assert destroyed.phase in (PHASE.PHASE_REMOVING, PHASE.PHASE_REMOVED)
    async with asyncio.timeout(HANG_S):
        last = [seen async for seen in watch][-1]
    assert last.phase == PHASE.PHASE_REMOVED
    for call in (demo.sandboxes.GetSandbox(named(ID)), demo.sandboxes.DestroySandbox(named(ID))):
        assert (await refusal_of(call)).code == "sandbox_unknown"
    error = await refusal_of(demo.sandboxes.CreateSandbox(create()))
    assert (type(error), error.code) == (ConflictError, "id_destroyed")
    assert (await demo.sandboxes.CreateSandbox(create(1, spec(0)))).spec.name == "box-0"


async def test_creation_is_idempotent(demo: Client) -> None:
    """The same request again gives the same sandbox, also from many at once; another spec under the id is refused."""
    answers = await asyncio.gather(*(demo.sandboxes.CreateSandbox(create()) for _ in range(8)))
    assert len({answer.created_at_ms for answer in answers}) == 1
    listed = await demo.sandboxes.ListSandboxes(service_pb2.ListSandboxesRequest())
    assert [one.sandbox_id for one in listed.sandboxes] == [ID]
    error = await refusal_of(demo.sandboxes.CreateSandbox(create(0, spec(9))))
    assert (type(error), error.code, error.next_step) == (ConflictError, "id_reused", "choose another id")


async def test_names_are_unique_within_a_tenant(demo: Client, other: Client) -> None:
    """A taken name is refused and says by whom it is taken; another tenant may have the same."""
    await demo.sandboxes.CreateSandbox(create(0))
    error = await refusal_of(demo.sandboxes.CreateSandbox(create(1, spec(0))))
    assert error.code == "name_taken"
    assert ID in error.message
    await other.sandboxes.CreateSandbox(create(2, spec(0)))


async def test_what_is_written_is_read(demo: Client) -> None:
    """Whoever created, stopped or destroyed a sandbox finds it so in the next answer."""
    for number in range(10):
        await demo.sandboxes.CreateSandbox(create(number))
        listed = await demo.sandboxes.ListSandboxes(service_pb2.ListSandboxesRequest())
        assert len(listed.sandboxes) == number + 1
    stopped = await demo.sandboxes.StopSandbox(named("box-3"))
    assert stopped.phase == PHASE.PHASE_STOPPED
    assert (await demo.sandboxes.GetSandbox(named("box-3"))).goal == sandbox_pb2.GOAL_STOP


async def test_a_refusal_reaches_the_client(demo: Client) -> None:
    """A pending sandbox shows why no host takes it, with counts."""
    await demo.sandboxes.CreateSandbox(create())
    watch = demo.sandboxes.WatchSandbox(named(ID))
    async with asyncio.timeout(HANG_S):
        async for seen in watch:
            if seen.HasField("refusal"):
                break
    assert [reason.code for reason in seen.refusal.reasons] == ["no_hosts"]
    watch.cancel()


BAD_SPECS = [
    (spec(name="No!"), "field_invalid", "name"),
    (spec(resources=Resources(vcpus=0, memory_mib=512, disk_mib=1024, gpus=1)), "field_invalid", "resources.vcpus"),
    (spec(secrets=("key",)), "field_invalid", "secrets[0]"),
    (spec(network=Network(NetworkMode.BRIDGED)), "not_enforceable", "network.mode"),
    (spec(sources=(source(),)), "source_missing", "sources[0].digest"),
]


@pytest.mark.parametrize(("wanted", "code", "field"), BAD_SPECS, ids=[case[1] + "-" + case[2] for case in BAD_SPECS])
async def test_a_bad_spec_is_refused(demo: Client, wanted: SandboxSpec, code: str, field: str) -> None:
    """The answer names code, field and what to do; nothing is written."""
    error = await refusal_of(demo.sandboxes.CreateSandbox(create(0, wanted)))
    assert isinstance(error, InvalidSpecError)
    assert (error.code, error.field) == (code, field)
    assert error.next_step
    listed = await demo.sandboxes.ListSandboxes(service_pb2.ListSandboxesRequest())
    assert len(listed.sandboxes) == 0


async def test_further_bad_fields_are_named(demo: Client) -> None:
    """The first refusal is explained, the fields of the others are listed, so that one attempt shows all there is to mend."""
    bad = spec(resources=Resources(vcpus=0, memory_mib=1, disk_mib=1))
    error = await refusal_of(demo.sandboxes.CreateSandbox(create(0, bad)))
    assert "resources.memory_mib, resources.disk_mib" in error.message


async def test_a_bad_request_is_refused(demo: Client) -> None:
    """An id that is none, an enum nobody knows: invalid, not a crash."""
    request = service_pb2.CreateSandboxRequest(sandbox_id="../etc", spec=to_message(spec()))
    assert (await refusal_of(demo.sandboxes.CreateSandbox(request))).code == "id_invalid"
    request = create()
    request.spec.network.mode = 99
    assert (await refusal_of(demo.sandboxes.CreateSandbox(request))).code == "unknown_value"


async def test_tenants_see_only_their_own(demo: Client, other: Client, operator: Client) -> None:
    """To a stranger a sandbox is as unknown as one that does not exist, in every call; an operator sees all."""
    await demo.sandboxes.CreateSandbox(create())
    for name in (ID, "box-0"):
        for method in ("GetSandbox", "StopSandbox", "DestroySandbox"):
            error = await refusal_of(getattr(other.sandboxes, method)(named(name)))
            assert (type(error), error.code) == (NotFoundError, "sandbox_unknown")
        error = await refusal_of(anext(aiter(other.sandboxes.WatchSandbox(named(name)))))
        assert error.code == "sandbox_unknown"
        wanted = service_pb2.ReadOutputRequest(sandbox=name)
        assert (await refusal_of(anext(aiter(other.output.ReadOutput(wanted))))).code == "sandbox_unknown"
        artifact = content_pb2.FetchArtifactRequest(sandbox=name)
        assert (await refusal_of(anext(aiter(other.content.FetchArtifact(artifact))))).code == "sandbox_unknown"
    error = await refusal_of(other.sandboxes.GetSandbox(named(ID, tenant="demo")))
    assert (type(error), error.code) == (NotPermittedError, "tenant_not_permitted")
    assert (await refusal_of(other.sandboxes.CreateSandbox(create()))).code == "id_reused"
    assert len((await other.sandboxes.ListSandboxes(service_pb2.ListSandboxesRequest())).sandboxes) == 0
    assert (await operator.sandboxes.GetSandbox(named("box-0", tenant="demo"))).sandbox_id == ID
    assert len((await operator.sandboxes.ListSandboxes(service_pb2.ListSandboxesRequest())).sandboxes) == 1


async def test_operators_say_for_whom(demo: Client, operator: Client) -> None:
    """An operator creates for a tenant it names, and for none otherwise."""
    assert (await refusal_of(operator.sandboxes.CreateSandbox(create()))).code == "tenant_missing"
    made = await operator.sandboxes.CreateSandbox(create(tenant="demo"))
    assert made.tenant == "demo"
    assert (await demo.sandboxes.GetSandbox(named(ID))).sandbox_id == ID


async def test_another_tenants_tombstone_says_little(store: Store, demo: Client) -> None:
    """An id that another tenant has used up is merely in use."""
    await store.transact([], [Put(tombstone_key(ID), b"other")])
    assert (await refusal_of(demo.sandboxes.CreateSandbox(create()))).code == "id_reused"


async def test_hosts_are_for_operators(demo: Client, operator: Client, fleet: Fleet, local: ObedientHost) -> None:
    """An operator lists hosts with what is set aside on them; a tenant is told which role it takes; hosts call nothing."""
    error = await refusal_of(demo.hosts.ListHosts(host_pb2.ListHostsRequest()))
    assert (type(error), error.code) == (NotPermittedError, "role_not_permitted")
    assert "operator" in error.next_step
    await demo.sandboxes.CreateSandbox(create())
    await local.ordered(ID)
    (found,) = (await operator.hosts.ListHosts(host_pb2.ListHostsRequest())).hosts
    assert (found.record.host_id, found.is_alive, found.reserved.sandboxes) == (local.host_id, True, 1)
    as_host = fleet.client(Role.HOST, local.host_id)
    assert (await refusal_of(as_host.sandboxes.CreateSandbox(create()))).code == "role_not_permitted"
    fetch = as_host.content.FetchSource(content_pb2.FetchSourceRequest())
    assert (await refusal_of(anext(aiter(fetch)))).code == "role_not_permitted"


async def test_a_dead_host_is_told(demo: Client, operator: Client, store: Store, pki: Path, tmp_path: Path) -> None:
    """When a host's lease is gone its sandboxes are lost, to be seen in a watch, and its output is unavailable for now."""
    async with ObedientHost(store, pki, tmp_path / "dying").running() as dying:
        await demo.sandboxes.CreateSandbox(create())
        watch = demo.sandboxes.WatchSandbox(named(ID))
        await next_phase(watch, PHASE.PHASE_STARTING)
        await dying.start(ID)
        await next_phase(watch, PHASE.PHASE_RUNNING)
    await next_phase(watch, PHASE.PHASE_LOST)
    watch.cancel()
    output = demo.output.ReadOutput(service_pb2.ReadOutputRequest(sandbox=ID))
    error = await refusal_of(anext(aiter(output)))
    assert (type(error), error.code) == (UnavailableError, "host_lost")
    assert error.next_step


async def test_nothing_is_served_in_plain_text(fleet: Fleet, demo: Client) -> None:
    """A client without TLS, and one without a certificate, get no answer."""
    async with grpc.aio.insecure_channel(fleet.address) as plain:
        stub = Client(plain).sandboxes
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetSandbox(named(ID), timeout=HANG_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    nobody = grpc.ssl_channel_credentials((fleet.pki / "ca.crt").read_bytes())
    options = [("grpc.ssl_target_name_override", "scheduler.bedplate")]
    async with grpc.aio.secure_channel(fleet.address, nobody, options=options) as anonymous:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Client(anonymous).sandboxes.GetSandbox(named(ID), timeout=HANG_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_store_that_is_away_is_waited_for(memory: MemoryStore, pki: Path) -> None:
    """Started without its store a scheduler answers UNAVAILABLE with a next step, and serves when the store comes."""
    memory.is_reachable = False
    async with Fleet(memory, pki).running() as fleet:
        client = fleet.client(Role.TENANT, "demo")
        request = service_pb2.ListSandboxesRequest()
        call = client.sandboxes.ListSandboxes(request, wait_for_ready=True, timeout=HANG_S)
        error = await refusal_of(call)
        assert (type(error), error.code) == (UnavailableError, "store_unavailable")
        assert error.next_step
        assert (await refusal_of(client.sandboxes.CreateSandbox(create()))).code == "store_unavailable"
        memory.is_reachable = True
        async with asyncio.timeout(HANG_S):
            await fleet.answers()
        assert (await client.sandboxes.CreateSandbox(create())).sandbox_id == ID


async def test_a_large_listing_is_brief(demo: Client) -> None:
    """Long commands do not make a listing fail: they are left out there, and shown for one sandbox."""
    long = replace(spec(0), agents=(Agent("worker", "custom", ("x" * 6_000,), memory_mib=256),))
    for number in range(3):
        await demo.sandboxes.CreateSandbox(create(number, replace(long, name=f"box-{number}")))
    listed = await demo.sandboxes.ListSandboxes(service_pb2.ListSandboxesRequest())
    assert listed.ByteSize() < 6_000
    shown = await demo.sandboxes.GetSandbox(named("box-2"))
    assert len(shown.spec.agents[0].command[0]) == 6_000


async def test_a_caller_that_changes_without_end_is_slowed(demo: Client, other: Client) -> None:
    """Past its burst a caller is told to wait, and another is served as before."""
    errors = await asyncio.gather(*(refusal_of(demo.sandboxes.StopSandbox(named(ID))) for _ in range(700)))
    assert {error.code for error in errors} == {"sandbox_unknown", "calls_exhausted"}
    assert (await refusal_of(other.sandboxes.StopSandbox(named(ID)))).code == "sandbox_unknown"


async def test_health_follows_the_store(memory: MemoryStore, pki: Path) -> None:
    """While the store is away the scheduler says that it serves nothing, to whoever watches; and that it does when it is back."""
    async with Fleet(memory, pki).running() as fleet:
        await fleet.answers()
        stub = health_pb2_grpc.HealthStub(fleet.client(Role.OPERATOR, "operator").channel)
        for service in ("", "bedplate.sandbox.v1.SandboxService"):
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
            async with asyncio.timeout(HANG_S):
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                memory.is_reachable = False
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                memory.is_reachable = True
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
