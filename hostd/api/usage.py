"""Serves what this host's sandboxes use now. It is measured when it is asked for, and at no other time."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.codec import to_message
from fleet.model.ids import HostId, SandboxId
from fleet.model.usage import SandboxUsage
from hostd.clock import now_ms
from hostd.drivers.ports import VmUse
from hostd.orders import Orders


class Heard(Protocol):
    """What guests say of themselves."""

    def guest_memory_mib(self, sandbox_id: SandboxId) -> int: ...
    def silent_s(self, sandbox_id: SandboxId) -> float: ...
    def attached(self) -> frozenset[SandboxId]: ...


class UsageService(service_pb2_grpc.UsageServiceServicer):
    """The use of every VM of a tenant, or of all."""

    def __init__(
        self,
        host_id: HostId,
        orders: Orders,
        heard: Heard,
        measure: Callable[[], Awaitable[Mapping[SandboxId, VmUse]]],
        disks: Callable[[], Awaitable[Mapping[SandboxId, int]]],
    ) -> None:
        self._host_id = host_id
        self._orders = orders
        self._heard = heard
        self._measure = measure
        self._disks = disks

    async def ReadUsage(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 (the stub's names)
        """One entry for each sandbox that has a VM."""
        measured, disks = await self._measure(), await self._disks()
        response = service_pb2.ReadUsageResponse()
        for sandbox_id, use in sorted(measured.items()):
            order = self._orders.orders.get(sandbox_id)
            if order is not None and request.tenant in ("", order.tenant):
                response.usages.append(to_message(self._describe(sandbox_id, use, disks.get(sandbox_id, 0))))
        return response

    def _describe(self, sandbox_id: SandboxId, use: VmUse, disk_mib: int) -> SandboxUsage:
        at_ms = now_ms()
        is_heard = sandbox_id in self._heard.attached()
        return SandboxUsage(
            sandbox_id=sandbox_id,
            host_id=self._host_id,
            at_ms=at_ms,
            cpu_ms=use.cpu_ms,
            vmm_memory_mib=use.memory_mib,
            guest_memory_mib=self._heard.guest_memory_mib(sandbox_id),
            disk_mib=disk_mib,
            heard_at_ms=at_ms - int(self._heard.silent_s(sandbox_id) * 1000) if is_heard else 0,
        )
