"""ExecService: passes a program's bytes between a client and the host that runs it, both ways, at the pace of the slower side.

It reads no more of either side than the other one takes, keeps nothing, and ends with whichever side ends first.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from bedplate.sandbox.v1 import service_pb2_grpc
from fleet.errors import ConflictError, InvalidSpecError, UnavailableError
from fleet.gatekeeper import caller_of
from fleet.model.ids import HostId
from fleet.model.sandbox import SandboxRecord
from scheduler.api.access import find_sandbox
from scheduler.api.channels import HostChannels
from scheduler.api.lookup import fresh_with
from scheduler.api.relay import IDLE_S, Slots, on_behalf_of, relay
from scheduler.placement.snapshot import Snapshot
from scheduler.state import FleetState

# One caller's. A host takes 16 for one sandbox; each is a stream to the client, one to the host and two messages in memory.
EXECS_MAX = 64
# A forgotten shell gives its slot back in the end; a silent build, a night's test run and a long lunch are no reason.
EXEC_IDLE_S = 12 * 3600.0


class ExecService(service_pb2_grpc.ExecServiceServicer):
    """Programs in running sandboxes, wherever these run."""

    def __init__(self, state: FleetState, channels: HostChannels, idle_s: float = EXEC_IDLE_S) -> None:
        self._state = state
        self._channels = channels
        self._idle_s = idle_s
        self._execs = Slots("programs", EXECS_MAX)

    async def Exec(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """The host's answers, while the client's messages are passed on to it; no deadline but EXEC_IDLE_S of silence."""
        self._execs.take(context)
        caller = caller_of(context)
        opened = await _read_open(request_iterator)
        snapshot = await fresh_with(self._state, caller, opened.open.sandbox, opened.open.tenant)
        record = find_sandbox(snapshot, caller, opened.open.sandbox, opened.open.tenant)
        opened.open.sandbox, opened.open.tenant = record.sandbox_id, record.tenant
        host_id = host_of(snapshot, record)
        stub = service_pb2_grpc.ExecServiceStub(self._channels.channel(snapshot, host_id))
        silence = _Silence(self._idle_s)
        call: Any = stub.Exec(_passed_on(opened, request_iterator, silence), metadata=on_behalf_of(caller))
        silence.begin(call.cancel)
        try:
            async for response in relay(call, host_id, context, None):
                silence.broken()
                yield response
        except UnavailableError as error:
            if not silence.is_over:
                raise
            message = f"nothing was said for {self._idle_s:.0f} s, so the program was ended"
            raise UnavailableError("exec_idle", message, "run it again") from error
        finally:
            silence.end()


def host_of(snapshot: Snapshot, record: SandboxRecord) -> HostId:
    """The host that has a sandbox; raises ConflictError `not_running` when none has it yet."""
    assignment = snapshot.assignment_of(record)
    if assignment is None:
        message = f"sandbox {record.spec.name} has no host"
        raise ConflictError("not_running", message, "try again when mb status shows it running")
    return assignment.host_id


class _Silence:
    """Ends a call once nothing was said for `idle_s`."""

    def __init__(self, idle_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle_s = idle_s
        self._since_s = self._loop.time()
        self.is_over = False

    def begin(self, over: Callable[[], Any]) -> None:
        """From now on silence calls `over`."""
        self._over = over
        self._timer = self._loop.call_later(self._idle_s, self._look)

    def broken(self) -> None:
        """Something was said."""
        self._since_s = self._loop.time()

    def end(self) -> None:
        """Nobody listens any more."""
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self._since_s + self._idle_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self.is_over = True
            self._over()


async def _read_open(requests: AsyncIterator[Any]) -> Any:
    try:
        async with asyncio.timeout(IDLE_S):
            first = await anext(requests, None)
    except TimeoutError as error:
        message = f"nothing arrived for {IDLE_S:.0f} s"
        raise UnavailableError("exec_idle", message, "open the program at once") from error
    if first is None or first.WhichOneof("part") != "open":
        raise InvalidSpecError("open_missing", "a program begins with its opening", "send open first", field="open")
    return first


async def _passed_on(opened: Any, requests: AsyncIterator[Any], silence: _Silence) -> AsyncIterator[Any]:
    """The client's messages; gRPC takes the next one when the host has taken the last."""
    yield opened
    async for request in requests:
        silence.broken()
        yield request
