"""Hosts that say what a test scripts, behind real servers: for what the scheduler passes on without looking into it."""

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from bedplate.sandbox.v1 import event_pb2_grpc, network_pb2_grpc, service_pb2, service_pb2_grpc
from fleet.certificates import issue_certificate
from fleet.codec import encode, to_message
from fleet.gatekeeper import actor_of
from fleet.identity import Identity, KeyPair, Role, TlsFiles
from fleet.model.egress import NetworkEvent
from fleet.model.event import Event
from fleet.model.ids import HostId
from fleet.model.sandbox import Phase, SandboxRecord
from fleet.server import start_server
from fleet.store.keyspace import alive_key, assignment_key
from fleet.store.port import Delete, Put, Store
from provisioning.embedded.etcd import LOOPBACK
from tests.unit.scheduler.build import assignment, host, host_puts, record_puts, status, status_put

Program = Callable[[AsyncIterator[Any], Any], AsyncIterator[Any]]
PERMISSIONS = {
    f"bedplate.sandbox.v1.{method}": frozenset({Role.SCHEDULER})
    for method in (
        "ExecService/Exec",
        "SecretService/SendSecrets",
        "UsageService/ReadUsage",
        "EventService/ReadEvents",
        "NetworkService/ReadNetwork",
    )
}


def output(payload: bytes) -> Any:
    return service_pb2.ExecResponse(stdout=payload)


def ended(code: int = 0) -> Any:
    return service_pb2.ExecResponse(ended=service_pb2.ExecEnded(exit_code=code))


async def cat(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
    """Answers its opening, then every input with the same bytes, then ends well."""
    await anext(requests)
    yield service_pb2.ExecResponse(started=service_pb2.ExecStarted())
    async for request in requests:
        if request.HasField("input"):
            yield output(request.input)
        elif request.HasField("input_end"):
            break
    yield ended()


class FarHost:
    """A host by name with a certificate of its own; alive and serving within `running`."""

    def __init__(self, store: Store, pki: Path, folder: Path, name: str = "far") -> None:
        self.host_id = HostId(name)
        self.program: Program = cat
        self.execs = 0
        self.requests: list[tuple[str, Any, str]] = []
        self.usages: list[Any] = []
        self.events: list[Event] = []
        self.network: list[NetworkEvent] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.said = asyncio.Condition()
        self._store = store
        self._tls = _issue(pki, folder, name)
        self._server: grpc.aio.Server | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FarHost"]:
        """Serves and is alive within the context."""
        await self.start()
        try:
            yield self
        finally:
            await self.stop()

    async def start(self) -> None:
        """Begins to serve, at a new address."""

        def register(server: grpc.aio.Server) -> None:
            service_pb2_grpc.add_ExecServiceServicer_to_server(_Execs(self), server)
            service_pb2_grpc.add_SecretServiceServicer_to_server(_Secrets(self), server)
            service_pb2_grpc.add_UsageServiceServicer_to_server(_Usage(self), server)
            event_pb2_grpc.add_EventServiceServicer_to_server(_Events(self), server)
            network_pb2_grpc.add_NetworkServiceServicer_to_server(_Network(self), server)

        self._server, port = await start_server(f"{LOOPBACK}:0", self._tls, PERMISSIONS, register)
        self.record = host(self.host_id, address=f"{LOOPBACK}:{port}")
        await self._store.transact([], host_puts(self.record))

    async def stop(self) -> None:
        """Is gone, and its lease with it."""
        await self._store.transact([], [Delete(alive_key(self.host_id))])
        if self._server is not None:
            await self._server.stop(None)
        self._server = None

    async def carry(self, wish: SandboxRecord, phase: Phase = Phase.RUNNING, **changes: Any) -> None:
        """The sandbox of `wish` is ordered here, and this is what the host says of it."""
        order = assignment(wish, self.record)
        said = replace(status(order, phase), **changes)
        put = Put(assignment_key(order.host_id, order.sandbox_id), encode(order))
        await self._store.transact([], [*record_puts(wish), put, status_put(said)])

    async def tell(self, *events: Event) -> None:
        """These have happened."""
        async with self.said:
            self.events.extend(events)
            self.said.notify_all()


class _Execs(service_pb2_grpc.ExecServiceServicer):
    def __init__(self, owner: FarHost) -> None:
        self._owner = owner

    async def Exec(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self._owner.execs += 1
        try:
            async for response in self._owner.program(self._noted(request_iterator, context), context):
                yield response
        finally:
            self._owner.execs -= 1

    async def _noted(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            self._owner.requests.append(("exec", request, actor_of(context)))
            yield request


class _Secrets(service_pb2_grpc.SecretServiceServicer):
    def __init__(self, owner: FarHost) -> None:
        self._owner = owner

    async def SendSecrets(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's name)
        self._owner.requests.append(("secrets", request, actor_of(context)))
        return service_pb2.SendSecretsResponse()


class _Usage(service_pb2_grpc.UsageServiceServicer):
    def __init__(self, owner: FarHost) -> None:
        self._owner = owner

    async def ReadUsage(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's name)
        self._owner.requests.append(("usage", request, actor_of(context)))
        await self._owner.gate.wait()
        return service_pb2.ReadUsageResponse(usages=self._owner.usages)


class _Events(event_pb2_grpc.EventServiceServicer):
    def __init__(self, owner: FarHost) -> None:
        self._owner = owner

    async def ReadEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 (the stub's name)
        self._owner.requests.append(("events", request, actor_of(context)))
        read = 0
        while True:
            await self._owner.gate.wait()
            for event in self._owner.events[read:]:
                read += 1
                is_asked = request.sandbox in ("", event.sandbox_id) and request.tenant in ("", event.tenant)
                if is_asked and event.at_ms >= request.since_ms:
                    yield to_message(event)
            if not request.follow:
                return
            async with self._owner.said:
                while read == len(self._owner.events):
                    await self._owner.said.wait()


class _Network(network_pb2_grpc.NetworkServiceServicer):
    def __init__(self, owner: FarHost) -> None:
        self._owner = owner

    async def ReadNetwork(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 (the stub's name)
        self._owner.requests.append(("network", request, actor_of(context)))
        for event in self._owner.network:
            yield to_message(event)


def _issue(pki: Path, folder: Path, name: str) -> TlsFiles:
    authority = KeyPair((pki / "ca.crt").read_bytes(), (pki / "ca.key").read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    pair = issue_certificate(authority, Identity(Role.HOST, name), now, [LOOPBACK])
    folder.mkdir(exist_ok=True)
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    certificate.write_bytes(pair.certificate)
    key.write_bytes(pair.key)
    return TlsFiles(pki / "ca.crt", certificate, key)
