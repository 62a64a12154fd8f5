"""OutputService: finds the host that has the output, and passes it on from any offset.

A follow is many calls to the host, each FOLLOW_ROUND_S at most and each from where the last one ended: it outlives a restart of
hostd, and every call has a deadline.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.errors import InvalidSpecError, UnavailableError
from fleet.gatekeeper import caller_of
from fleet.model.ids import HostId
from fleet.model.sandbox import Goal, SandboxRecord
from scheduler.api.access import find_sandbox
from scheduler.api.channels import HostChannels
from scheduler.api.lookup import fresh_with
from scheduler.api.relay import Slots, relay
from scheduler.api.wishes import current_status
from scheduler.placement.evictions import awaits_move
from scheduler.placement.snapshot import Snapshot
from scheduler.state import FleetState

FOLLOW_ROUND_S = 300.0
# One caller's: half of all the sandboxes a tenant may have, followed at once.
READS_MAX = 500
# A hostd that restarts is back within seconds; a host that is gone for longer is told, with the offset left to the client.
RECONNECT_S = 1.0
RECONNECTS_MAX = 30


class OutputService(service_pb2_grpc.OutputServiceServicer):
    """Output of agents, wherever they run."""

    def __init__(self, state: FleetState, channels: HostChannels) -> None:
        self._state = state
        self._channels = channels
        self._reads = Slots("reads of output", READS_MAX)

    async def ReadOutput(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 (the stub's name)
        """Chunks from `offset` on; with follow, waits for a host if need be and goes on until nothing can follow."""
        self._reads.take(context)
        caller = caller_of(context)
        snapshot = await fresh_with(self._state, caller, request.sandbox, request.tenant)
        record = find_sandbox(snapshot, caller, request.sandbox, request.tenant)
        wanted = service_pb2.ReadOutputRequest(
            sandbox=record.sandbox_id,
            tenant=record.tenant,
            agent=_agent_name(record, request.agent),
            offset=request.offset,
            follow=request.follow,
            since_ms=request.since_ms,
            tail_lines=request.tail_lines,
        )
        placement = request.placement
        while True:
            host_id = await self._find(record, is_followed=request.follow)
            if host_id is None:
                yield service_pb2.OutputChunk(offset=wanted.offset, end=self._is_final(record), placement=placement)
                return
            present = self._placement(record)
            if placement and present > placement:
                # What was read is an earlier placement's, and gone with it: this one's begins anew.
                wanted.offset = wanted.since_ms = wanted.tail_lines = 0
            placement = present
            chunks = self._follow(record, wanted, host_id, context) if request.follow else None
            async for chunk in chunks or self._read(wanted, host_id, context):
                chunk.placement = placement
                yield chunk
                if chunk.end:
                    return
            if not request.follow:
                return

    async def _find(self, record: SandboxRecord, *, is_followed: bool) -> HostId | None:
        """The host that has the output, waited for when it is followed; None when there is none to wait for."""
        while True:
            changed = self._state.changed()
            snapshot = self._state.snapshot()
            host_id, is_final = find_output(snapshot, record, is_followed=is_followed)
            is_waited_for = is_followed and not is_final
            if not (is_waited_for and (host_id is None or is_moving(snapshot, record))):
                return host_id
            await changed.wait()

    def _is_final(self, record: SandboxRecord) -> bool:
        return find_output(self._state.snapshot(), record)[1]

    def _placement(self, record: SandboxRecord) -> int:
        current = self._state.snapshot().records.get(record.sandbox_id, record)
        return max(1, current.placement)

    async def _follow(self, record: SandboxRecord, wanted: Any, host_id: HostId, context: Any) -> AsyncIterator[Any]:
        """What the host has, to its end; ends without one when the sandbox goes on elsewhere."""
        failures, placement = 0, self._placement(record)
        while not self._has_left(record, placement):
            try:
                async for chunk in self._read_placed(record, wanted, host_id, context):
                    failures = 0
                    wanted.offset = chunk.offset + len(chunk.payload)
                    # Where to begin is settled: what follows is read on by offset, also from a host that has restarted.
                    wanted.since_ms = wanted.tail_lines = 0
                    if chunk.end and self._has_left(record, placement):
                        return
                    yield chunk
                    if chunk.end:
                        return
                raise UnavailableError("output_cut", f"host {host_id} ended the output early", "read on by offset")
            except UnavailableError as error:
                if error.code == "deadline_exceeded" or self._has_left(record, placement):
                    continue
                failures += 1
                if failures > RECONNECTS_MAX:
                    raise
                await asyncio.sleep(RECONNECT_S)

    def _has_left(self, record: SandboxRecord, placement: int) -> bool:
        return self._placement(record) > placement or is_moving(self._state.snapshot(), record)

    async def _read_placed(
        self, record: SandboxRecord, wanted: Any, host_id: HostId, context: Any
    ) -> AsyncIterator[Any]:
        """As `_read`, until the sandbox leaves the host: one that was lost may never say that it has."""
        placement = self._placement(record)
        call = self._open(wanted, host_id)

        async def hang_up() -> None:
            while not self._has_left(record, placement):
                await self._state.changed().wait()
                # The store changes all the time, and hundreds follow.
                await asyncio.sleep(RECONNECT_S)
            call.cancel()

        watcher = asyncio.ensure_future(hang_up())
        try:
            async for chunk in relay(call, host_id, context, None):
                yield chunk
        finally:
            watcher.cancel()

    async def _read(self, wanted: Any, host_id: HostId, context: Any) -> AsyncIterator[Any]:
        async for chunk in relay(self._open(wanted, host_id), host_id, context):
            yield chunk

    def _open(self, wanted: Any, host_id: HostId) -> Any:
        channel = self._channels.channel(self._state.snapshot(), host_id)
        return service_pb2_grpc.OutputServiceStub(channel).ReadOutput(wanted, timeout=FOLLOW_ROUND_S)


def is_moving(snapshot: Snapshot, record: SandboxRecord) -> bool:
    """Whether its host calls an end what is none: it goes on elsewhere."""
    current = snapshot.records.get(record.sandbox_id)
    assignment = snapshot.assignment_of(current) if current is not None else None
    status = snapshot.status_of(assignment) if assignment is not None else None
    return (
        current is not None
        and assignment is not None
        and status is not None
        and status.run >= assignment.run
        and awaits_move(current, assignment, status)
    )


def find_output(snapshot: Snapshot, record: SandboxRecord, *, is_followed: bool = False) -> tuple[HostId | None, bool]:
    """The host that has a sandbox's output; without one, whether there will never be any.

    Who follows a sandbox that waits for its next run is given that run's output as well: until its host speaks of it there is
    nothing to follow.
    """
    current = snapshot.records.get(record.sandbox_id)
    if current is None:
        return None, True
    assignment = snapshot.assignment_of(current)
    if assignment is None:
        return None, current.goal is not Goal.RUN
    # Before its host has published a status, it may not know of the sandbox yet.
    status = current_status(current, snapshot) if is_followed else snapshot.status_of(assignment)
    return (assignment.host_id if status is not None else None), False


def _agent_name(record: SandboxRecord, name: str) -> str:
    names = [agent.name for agent in record.spec.agents]
    if not name and len(names) == 1:
        return names[0]
    if name not in names:
        message = f"sandbox {record.spec.name} has the agents {', '.join(names)}; {name[:80]!r} is none of them"
        raise InvalidSpecError("agent_unknown", message, "name one of them", field="agent")
    return name
