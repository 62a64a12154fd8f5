"""Usage is read from all hosts at once; one that is away or silent is named, and costs nobody else's figures."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.identity import Role
from fleet.model.sandbox import Phase
from fleet.store.memory import MemoryStore
from scheduler.api.usage import carried
from tests.integration.scheduler.far import FarHost
from tests.integration.scheduler.parts import Client, Fleet
from tests.unit.scheduler.build import DEMO, OTHER, assignment, host, record, sandbox_id, snapshot, status


@pytest.fixture
async def memory() -> MemoryStore:
    return MemoryStore(monotonic)


@pytest.fixture
async def hosts(memory: MemoryStore, pki: Path, tmp_path: Path) -> AsyncIterator[list[FarHost]]:
    """Two hosts: one with a sandbox of `demo` and one of `other`, one with a sandbox of `demo`."""
    async with AsyncExitStack() as stack:
        made = [FarHost(memory, pki, tmp_path / name, name) for name in ("one", "two")]
        for one in made:
            await stack.enter_async_context(one.running())
        await made[0].carry(record(0))
        await made[1].carry(record(1))
        await made[0].carry(replace(record(2), tenant=OTHER))
        for one, numbers in zip(made, ((0, 2), (1,)), strict=True):
            ids = [sandbox_id(number) for number in numbers]
            one.usages = [service_pb2.SandboxUsage(sandbox_id=id_, host_id=one.host_id, cpu_ms=7) for id_ in ids]
        yield made


@pytest.fixture
async def fleet(memory: MemoryStore, pki: Path, hosts: list[FarHost]) -> AsyncIterator[Fleet]:
    async with Fleet(memory, pki).running() as serving:
        for one in hosts:
            await serving.knows(one.host_id)
        yield serving


async def usage(client: Client, tenant: str = "") -> tuple[set[str], list[str]]:
    """The sandboxes that are listed, and the hosts that were not reached."""
    stub: Any = service_pb2_grpc.UsageServiceStub(client.channel)
    answer = await stub.ReadUsage(service_pb2.ReadUsageRequest(tenant=tenant))
    return {one.sandbox_id for one in answer.usages}, list(answer.unreached_hosts)


async def test_usage_is_of_ones_own_sandboxes(fleet: Fleet) -> None:
    """A tenant sees its own on all hosts, an operator everyone's or one tenant's, whatever a host says beyond that."""
    demo, operator = fleet.client(Role.TENANT, "demo"), fleet.client(Role.OPERATOR, "operator")
    assert await usage(demo) == ({sandbox_id(0), sandbox_id(1)}, [])
    assert await usage(operator) == ({sandbox_id(number) for number in range(3)}, [])
    assert await usage(operator, "other") == ({sandbox_id(2)}, [])


@pytest.mark.slow
async def test_a_host_that_is_silent_or_away_is_named(fleet: Fleet, hosts: list[FarHost]) -> None:
    """The others' figures come within the time that one host has; a tenant hears only of hosts that have something of its own."""
    silent, other = hosts[1], fleet.client(Role.TENANT, "other")
    silent.gate.clear()
    assert await usage(fleet.client(Role.TENANT, "demo")) == ({sandbox_id(0)}, ["two"])
    silent.gate.set()
    await silent.stop()
    assert await usage(fleet.client(Role.TENANT, "demo")) == ({sandbox_id(0)}, ["two"])
    assert await usage(other) == ({sandbox_id(2)}, [])


def test_only_what_runs_is_asked_for() -> None:
    """A sandbox whose host has released it uses nothing; nobody is asked about it."""
    wishes, carrier = [record(number) for number in range(3)], host()
    orders = [assignment(wish, carrier) for wish in wishes]
    phases = (Phase.RUNNING, Phase.STOPPED, Phase.COMPLETED)
    said = [
        status(order, phase, released=phase is not Phase.RUNNING) for order, phase in zip(orders, phases, strict=True)
    ]
    seen = snapshot(records=wishes, assignments=orders, statuses=said, hosts=[carrier])
    assert carried(seen, DEMO) == {carrier.host_id: {sandbox_id(0)}}
    assert carried(seen, OTHER) == {}
