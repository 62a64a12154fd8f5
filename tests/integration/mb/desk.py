"""A scheduler's API without a fleet behind it: real gRPC over mutual TLS, programs that really run, and state that a test sets.

It serves what mb calls, as the API's protocol says; what a scheduler does behind it is tested elsewhere.
"""

import asyncio
import fcntl
import os
import pty
import select
import signal
import struct
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from bedplate.sandbox.v1 import event_pb2_grpc, network_pb2_grpc, service_pb2, service_pb2_grpc
from fleet.codec import to_message
from fleet.errors import ConflictError, InvalidSpecError, NotFoundError
from fleet.identity import Role
from fleet.model.assignment import Sandbox
from fleet.model.egress import NetworkEvent
from fleet.model.event import Event
from fleet.model.usage import SandboxUsage
from fleet.server import start_server
from hostd.api.changes import Changes
from provisioning.embedded.etcd import LOOPBACK
from provisioning.embedded.pki import tls_files
from scheduler.api.permissions import PERMISSIONS
from tests.integration.mb.parts import OWN_TERMINAL

READ_BYTES = 64 * 1024
# How often a reader sees that its terminal was closed under it.
LOOK_S = 0.5


class Desk:
    """The state behind the API, and the API."""

    def __init__(self, pki: Path) -> None:
        self.pki = pki
        self.address = ""
        self.sandboxes: dict[str, Sandbox] = {}
        self.outputs: dict[str, bytes] = {}
        self.ended_outputs: set[str] = set()
        self.events: list[Event] = []
        self.network: list[NetworkEvent] = []
        self.breaks = 0
        self.usages: list[list[SandboxUsage]] = []
        self.unreached: list[str] = []
        self.secrets: list[dict[str, bytes]] = []
        self.opened: list[Any] = []
        # What a hostile guest runs, whatever it is asked to.
        self.instead: tuple[str, ...] = ()
        self.asked: list[tuple[str, str]] = []
        self.on_secrets: Callable[[], None] = lambda: None
        self.running: set[int] = set()
        self.changes = Changes()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Desk"]:
        """Serves within the context."""

        def register(server: Any) -> None:
            service_pb2_grpc.add_SandboxServiceServicer_to_server(_Sandboxes(self), server)
            service_pb2_grpc.add_ExecServiceServicer_to_server(_Execs(self), server)
            service_pb2_grpc.add_SecretServiceServicer_to_server(_Secrets(self), server)
            service_pb2_grpc.add_UsageServiceServicer_to_server(_Usages(self), server)
            service_pb2_grpc.add_OutputServiceServicer_to_server(_Outputs(self), server)
            event_pb2_grpc.add_EventServiceServicer_to_server(_Events(self), server)
            network_pb2_grpc.add_NetworkServiceServicer_to_server(_Network(self), server)

        server, port = await start_server(
            f"{LOOPBACK}:0", tls_files(self.pki, Role.SCHEDULER, "scheduler"), PERMISSIONS, register
        )
        self.address = f"{LOOPBACK}:{port}"
        try:
            yield self
        finally:
            await server.stop(None)

    def put(self, sandbox: Sandbox) -> None:
        """The sandbox is now so."""
        self.sandboxes[sandbox.sandbox_id] = sandbox
        self.changes.nudge()

    def remove(self, name: str) -> None:
        """Nothing of it is left."""
        del self.sandboxes[self.find(name).sandbox_id]
        self.changes.nudge()

    def find(self, name: str) -> Sandbox:
        """By id or name."""
        for sandbox in self.sandboxes.values():
            if name in (sandbox.sandbox_id, sandbox.spec.name):
                return sandbox
        raise NotFoundError("sandbox_unknown", f"there is no sandbox {name}", "see mb ls")

    def print(self, agent: str, content: bytes, *, end: bool = False) -> None:
        """An agent has printed."""
        self.outputs[agent] = self.outputs.get(agent, b"") + content
        if end:
            self.ended_outputs.add(agent)
        self.changes.nudge()

    def record(self, event: Event) -> None:
        """Something happened."""
        self.events.append(event)
        self.changes.nudge()

    async def until(self, holds: Callable[[], object]) -> None:
        """Returns once a call has made it so."""
        while True:
            changed = self.changes.subscribe()
            if holds():
                return
            await changed.wait()


class _Sandboxes(service_pb2_grpc.SandboxServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def GetSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802
        return to_message(self._desk.find(request.sandbox))

    async def ListSandboxes(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ListSandboxesResponse(sandboxes=map(to_message, self._desk.sandboxes.values()))

    async def WatchSandbox(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        sandbox_id, told = self._desk.find(request.sandbox).sandbox_id, None
        while sandbox_id in self._desk.sandboxes:
            changed = self._desk.changes.subscribe()
            now = self._desk.sandboxes[sandbox_id]
            if now != told:
                told = now
                yield to_message(now)
            else:
                await changed.wait()

    async def StopSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._ask("stop", request)

    async def StartSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self._desk.find(request.sandbox).phase != "stopped":
            raise ConflictError("not_stopped", "it is not stopped", "mb stop stops it")
        return self._ask("start", request)

    async def DestroySandbox(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = self._ask("destroy", request)
        self._desk.remove(request.sandbox)
        return answer

    def _ask(self, verb: str, request: Any) -> Any:
        found = self._desk.find(request.sandbox)
        self._desk.asked.append((verb, found.spec.name))
        self._desk.changes.nudge()
        return to_message(found)


class _Secrets(service_pb2_grpc.SecretServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def SendSecrets(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._desk.find(request.sandbox)
        self._desk.secrets.append({secret.name: secret.value for secret in request.secrets})
        self._desk.on_secrets()
        self._desk.changes.nudge()
        return service_pb2.SendSecretsResponse()


class _Usages(service_pb2_grpc.UsageServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def ReadUsage(self, request: Any, context: Any) -> Any:  # noqa: N802
        usages = self._desk.usages.pop(0) if len(self._desk.usages) > 1 else self._desk.usages[0]
        return service_pb2.ReadUsageResponse(usages=map(to_message, usages), unreached_hosts=self._desk.unreached)


class _Outputs(service_pb2_grpc.OutputServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def ReadOutput(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        desk, agent = self._desk, request.agent
        self._desk.opened.append(request)
        offset = request.offset
        if request.tail_lines:
            lines = desk.outputs.get(agent, b"").splitlines(keepends=True)
            offset = sum(map(len, lines[: -request.tail_lines]))
        while True:
            changed = desk.changes.subscribe()
            payload = desk.outputs.get(agent, b"")[offset:]
            is_end = agent in desk.ended_outputs
            if payload or is_end or not request.follow:
                yield service_pb2.OutputChunk(offset=offset, payload=payload, end=is_end)
            offset += len(payload)
            if is_end or not request.follow:
                return
            await changed.wait()


class _Events(event_pb2_grpc.EventServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def ReadEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        told = 0
        while True:
            changed = self._desk.changes.subscribe()
            fresh, told = self._desk.events[told:], len(self._desk.events)
            for event in fresh:
                if event.at_ms >= request.since_ms:
                    yield to_message(event)
            if not request.follow or (request.sandbox and any(event.kind == "sandbox.removed" for event in fresh)):
                return
            await changed.wait()


class _Execs(service_pb2_grpc.ExecServiceServicer):
    """Runs programs on this machine, as a guest would."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def Exec(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        opened = (await anext(aiter(requests))).open
        self._desk.opened.append(opened)
        if self._desk.find(opened.sandbox).phase != "running":
            raise ConflictError("not_running", f"{opened.sandbox} does not run", "see mb status NAME")
        if self._desk.instead:
            del opened.command[:]
            opened.command.extend(self._desk.instead)
        program = _Local(opened)
        try:
            await program.start()
        except OSError as error:
            message = f"{opened.command[0]}: {error.strerror}"
            yield service_pb2.ExecResponse(ended=service_pb2.ExecEnded(exit_code=127, message=message))
            return
        pid = program.pid
        self._desk.running.add(pid)
        feeder = asyncio.create_task(_feed(program, requests))
        try:
            yield service_pb2.ExecResponse(started=service_pb2.ExecStarted())
            async for stream, payload in program.output():
                yield service_pb2.ExecResponse(**{stream: payload})
            code = await program.end()
            ended = {"signal": -code} if code < 0 else {"exit_code": code}
            yield service_pb2.ExecResponse(ended=service_pb2.ExecEnded(**ended))
        finally:
            feeder.cancel()
            program.kill()
            self._desk.running.discard(pid)
            self._desk.changes.nudge()


async def _feed(program: "_Local", requests: AsyncIterator[Any]) -> None:
    with suppress(OSError):
        async for request in requests:
            part = request.WhichOneof("part")
            if part == "open":
                raise InvalidSpecError("open_twice", "a call opens one program")
            await program.take(part, getattr(request, part))


class _Local:
    """One program of this machine with pipes, or on a terminal."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self._master = -1
        self._process: Any = None

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    async def start(self) -> None:
        env = {"PATH": os.environ["PATH"], "TERM": self._opened.term or "dumb"}
        env |= {variable.name: variable.value for variable in self._opened.env}
        cwd = self._opened.workdir or Path("/")
        ends: Any = asyncio.subprocess.PIPE
        command, slave = list(self._opened.command), -1
        if self._opened.HasField("terminal"):
            self._master, slave = pty.openpty()
            self._resize(self._opened.terminal)
            ends, command = slave, [*OWN_TERMINAL, *command]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=ends,
                stdout=ends,
                stderr=ends,
                env=env,
                cwd=cwd,
                start_new_session=slave < 0,
            )
        finally:
            if slave >= 0:
                os.close(slave)

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        if self._master >= 0:
            while payload := await asyncio.to_thread(_read_terminal, self._master):
                yield "stdout", payload
            return
        queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(4)

        async def drain(name: str, stream: Any) -> None:
            while payload := await stream.read(READ_BYTES):
                await queue.put((name, payload))
            await queue.put((name, b""))

        drains = [asyncio.create_task(drain(name, getattr(self._process, name))) for name in ("stdout", "stderr")]
        open_streams = len(drains)
        while open_streams:
            name, payload = await queue.get()
            if payload:
                yield name, payload
            else:
                open_streams -= 1

    async def take(self, part: str, value: Any) -> None:
        if part == "signal":
            os.killpg(self.pid, value)
        elif part == "resize":
            self._resize(value)
        elif self._master >= 0:
            if part == "input":
                await asyncio.to_thread(os.write, self._master, value)
        elif part == "input":
            self._process.stdin.write(value)
            await self._process.stdin.drain()
        else:
            self._process.stdin.close()

    async def end(self) -> int:
        return int(await self._process.wait())

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        # What it wrote and nobody read goes with it.
        self._process._transport.close()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def _resize(self, size: Any) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))


def _read_terminal(master: int) -> bytes:
    try:
        # Not read() alone: it would outlast a terminal that is closed here and still open elsewhere.
        while not select.select([master], [], [], LOOK_S)[0]:
            pass
        return os.read(master, READ_BYTES)
    except (OSError, ValueError):  # EIO: nobody has it open any more; else it was closed here
        return b""


class _Network(network_pb2_grpc.NetworkServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def ReadNetwork(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self._desk.asked.append(("network", f"{request.sandbox} {request.follow} {request.denied}"))
        for event in self._desk.network:
            if event.at_ms >= request.since_ms and (event.is_denied or not request.denied):
                yield to_message(event)
        if self._desk.breaks:
            self._desk.breaks -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
