"""UsageService: asks every host that runs a caller's sandboxes at once, and says which ones did not answer in time."""

import asyncio
from typing import Any

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.errors import BedplateError
from fleet.gatekeeper import caller_of
from fleet.identity import Role
from fleet.model.ids import HostId, SandboxId, Tenant
from scheduler.api.access import tenant_of
from scheduler.api.channels import HostChannels
from scheduler.api.relay import Slots, calling
from scheduler.placement.snapshot import Snapshot, set_aside
from scheduler.state import FleetState

# A host reads a few files per sandbox; whoever looks at a table of usage waits no longer for one that is stuck.
HOST_TIMEOUT_S = 3.0
# Hosts asked at the same time for one call: a thousand hosts take a second, and no connection storm.
HOSTS_AT_ONCE = 64
# One caller's: a few screens that refresh themselves.
READS_MAX = 16


class UsageService(service_pb2_grpc.UsageServiceServicer):
    """What running sandboxes use, over all hosts."""

    def __init__(self, state: FleetState, channels: HostChannels) -> None:
        self._state = state
        self._channels = channels
        self._reads = Slots("reads of usage", READS_MAX)

    async def ReadUsage(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's name)
        """A tenant's sandboxes, or every tenant's for an operator who names none."""
        self._reads.take(context)
        caller = caller_of(context)
        is_all = caller.role is Role.OPERATOR and not request.tenant
        tenant = None if is_all else tenant_of(caller, request.tenant)
        wanted = carried(self._state.fresh(), tenant)
        gate = asyncio.Semaphore(HOSTS_AT_ONCE)
        answers = await asyncio.gather(*(self._ask(gate, host_id, tenant) for host_id in wanted))
        response = service_pb2.ReadUsageResponse()
        for (host_id, sandbox_ids), usages in zip(wanted.items(), answers, strict=True):
            if usages is None:
                response.unreached_hosts.append(host_id)
                continue
            # A host speaks of the sandboxes that it was given, and of nobody else's.
            response.usages.extend(one for one in usages if one.sandbox_id in sandbox_ids and one.host_id == host_id)
        return response

    async def _ask(self, gate: asyncio.Semaphore, host_id: HostId, tenant: Tenant | None) -> list[Any] | None:
        async with gate:
            try:
                stub = service_pb2_grpc.UsageServiceStub(self._channels.channel(self._state.snapshot(), host_id))
                with calling(host_id):
                    request = service_pb2.ReadUsageRequest(tenant=tenant or "")
                    answer = await stub.ReadUsage(request, timeout=HOST_TIMEOUT_S)
            except BedplateError:
                return None
            return list(answer.usages)


def carried(snapshot: Snapshot, tenant: Tenant | None) -> dict[HostId, set[SandboxId]]:
    """The sandboxes of a tenant, or of all, that use something of a host, by host."""
    found: dict[HostId, set[SandboxId]] = {}
    for sandbox_id, assignment in sorted(snapshot.assignments.items()):
        is_wanted = tenant is None or assignment.tenant == tenant
        if is_wanted and set_aside(assignment, snapshot.status_of(assignment)).vcpus:
            found.setdefault(assignment.host_id, set()).add(sandbox_id)
    return dict(sorted(found.items()))
