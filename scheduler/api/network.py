"""NetworkService: asks a sandbox's host what left the sandbox, or was denied, and passes that on.

What an earlier host has recorded went with the sandbox's folder there: the log is of its present placement.
"""

from collections.abc import AsyncIterator
from typing import Any

from bedplate.sandbox.v1 import network_pb2, network_pb2_grpc
from fleet.gatekeeper import caller_of
from fleet.model.ids import HostId
from fleet.model.sandbox import SandboxRecord
from scheduler.api.access import find_sandbox
from scheduler.api.channels import HostChannels
from scheduler.api.lookup import fresh_with
from scheduler.api.relay import Slots, relay
from scheduler.state import FleetState

# A follow is as many calls as it takes, each of which has an end: the client opens the next.
FOLLOW_ROUND_S = 300.0
# One caller's.
READS_MAX = 100


class NetworkService(network_pb2_grpc.NetworkServiceServicer):
    """The network log of one sandbox, wherever it runs."""

    def __init__(self, state: FleetState, channels: HostChannels) -> None:
        self._state = state
        self._channels = channels
        self._reads = Slots("reads of network logs", READS_MAX)

    async def ReadNetwork(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 (the stub's name)
        """What is there; with follow also what comes, from the host that the sandbox gets if it has none yet."""
        self._reads.take(context)
        caller = caller_of(context)
        snapshot = await fresh_with(self._state, caller, request.sandbox, request.tenant)
        record = find_sandbox(snapshot, caller, request.sandbox, request.tenant)
        host_id = await self._find_host(record, is_waited_for=request.follow)
        if host_id is None:
            return
        wanted = network_pb2.ReadNetworkRequest(
            sandbox=record.sandbox_id,
            tenant=record.tenant,
            follow=request.follow,
            since_ms=request.since_ms,
            denied=request.denied,
        )
        channel = self._channels.channel(self._state.snapshot(), host_id)
        call = network_pb2_grpc.NetworkServiceStub(channel).ReadNetwork(wanted, timeout=FOLLOW_ROUND_S)
        idle = {"idle_s": None} if request.follow else {}
        async for event in relay(call, host_id, context, **idle):
            # A host speaks of what it was asked.
            if (event.sandbox_id, event.tenant) == (record.sandbox_id, record.tenant):
                yield event

    async def _find_host(self, record: SandboxRecord, *, is_waited_for: bool) -> HostId | None:
        """The host that knows of the sandbox; None when none does, and none is waited for or will."""
        while True:
            changed, snapshot = self._state.changed(), self._state.snapshot()
            current = snapshot.records.get(record.sandbox_id)
            assignment = snapshot.assignment_of(current) if current is not None else None
            if assignment is not None and snapshot.status_of(assignment) is not None:
                return assignment.host_id
            if current is None or not is_waited_for:
                return None
            await changed.wait()
