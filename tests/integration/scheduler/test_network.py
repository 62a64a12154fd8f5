"""The network log of a sandbox through the scheduler: from its host, for its tenant, and nothing else that a host says."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from bedplate.sandbox.v1 import network_pb2, network_pb2_grpc
from fleet.errors import NotFoundError
from fleet.identity import Role
from fleet.model.egress import NetworkEvent, NetworkEventKind
from fleet.model.ids import Tenant
from fleet.rpc import error_from_call
from fleet.store.port import Store
from tests.integration.scheduler.far import FarHost
from tests.integration.scheduler.parts import Client, Fleet
from tests.unit.scheduler.build import OTHER, record, record_puts, sandbox_id

ID = sandbox_id(0)
EVENT = NetworkEvent(ID, Tenant("demo"), 1, 1000, NetworkEventKind.FRAMES, is_denied=True, reason="closed", count=3)


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


async def read(client: Client, sandbox: str, **asked: Any) -> list[tuple[int, str]]:
    stub: Any = network_pb2_grpc.NetworkServiceStub(client.channel)
    request = network_pb2.ReadNetworkRequest(sandbox=sandbox, **asked)
    return [(event.seq, event.reason) async for event in stub.ReadNetwork(request)]


async def test_the_hosts_log_is_passed_on(demo: Client, far: FarHost) -> None:
    """By id with all that was asked; what the host says of other sandboxes or tenants is left out."""
    await far.carry(record(0))
    far.network = [EVENT, replace(EVENT, seq=2, tenant=OTHER), replace(EVENT, seq=3, sandbox_id=sandbox_id(7))]
    assert await read(demo, "box-0", since_ms=7, denied=True) == [(1, "closed")]
    ((_, request, _),) = [one for one in far.requests if one[0] == "network"]
    assert (request.sandbox, request.tenant, request.since_ms, request.denied) == (ID, "demo", 7, True)
    # One stream of the host's has an end, and so has this one.
    assert await read(demo, ID, follow=True) == [(1, "closed")]


async def test_a_sandbox_without_a_host_has_nothing_to_tell(demo: Client, far: FarHost, store: Store) -> None:
    """It waits: nothing has left it."""
    await store.transact([], record_puts(record(0)))
    far.network = [EVENT]
    assert await read(demo, ID) == []


async def test_a_strangers_log_is_as_unknown_as_none(demo: Client, fleet: Fleet, far: FarHost) -> None:
    """Another tenant is told the same of what is there as of what is not."""
    await far.carry(record(0))
    other = fleet.client(Role.TENANT, "other")
    for client, sandbox in ((other, ID), (other, "box-0"), (demo, sandbox_id(9))):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(client, sandbox)
        error = error_from_call(caught.value, "scheduler")
        assert (type(error), error.code) == (NotFoundError, "sandbox_unknown")
