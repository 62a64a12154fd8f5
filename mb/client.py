"""A scheduler as mb sees it: one method a call, dataclasses in and out, every error one of fleet.errors.

Sandboxes are named by id or by name within the caller's tenant. Every call has a deadline.
"""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import grpc

from bedplate.content.v1 import content_pb2, content_pb2_grpc
from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.codec import from_message, to_message
from fleet.errors import BedplateError
from fleet.failover import open_failover
from fleet.identity import SCHEDULER_SERVER_NAME
from fleet.model.assignment import Sandbox
from fleet.model.ids import Digest, SandboxId, Tenant
from fleet.model.sandbox import SandboxSpec
from fleet.model.units import MIB
from fleet.rpc import CHUNK_BYTES, error_from_result, translated
from mb.config import ClientConfig
from mb.live import CALL_TIMEOUT_S, STREAM_TIMEOUT_S, Chunk, LiveCalls

if TYPE_CHECKING:
    from mb.pack import Packed

# The slowest link that content is still sent over, and the least a transfer is given.
BYTES_PER_S_MIN = MIB // 4
TRANSFER_TIMEOUT_S_MIN = 120.0


class Client:
    """Calls to the schedulers that errors name as `peer`, for one tenant (empty: that of the certificate)."""

    def __init__(self, channel: grpc.aio.Channel, peer: str, tenant: str) -> None:
        self._peer = peer
        self._tenant = tenant
        self.live = LiveCalls(channel, peer, tenant)
        # grpcio's generated stubs are typed for its synchronous twin.
        self._sandboxes: Any = service_pb2_grpc.SandboxServiceStub(channel)
        self._content: Any = content_pb2_grpc.ContentServiceStub(channel)

    async def create_sandbox(self, sandbox_id: SandboxId, spec: SandboxSpec) -> Sandbox:
        """The sandbox of that id and spec, made if it is not there: safe to repeat."""
        request = service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id, spec=to_message(spec), tenant=self._tenant)
        with translated(self._peer):
            return from_message(Sandbox, await self._sandboxes.CreateSandbox(request, timeout=CALL_TIMEOUT_S))

    async def create_sandboxes(
        self, creations: Sequence[tuple[SandboxId, SandboxSpec]]
    ) -> list[Sandbox | BedplateError]:
        """Many at once: the sandbox of each, or why there is none, in their order. Safe to repeat."""
        wanted = [service_pb2.Creation(sandbox_id=one, spec=to_message(spec)) for one, spec in creations]
        request = service_pb2.CreateSandboxesRequest(creations=wanted, tenant=self._tenant)
        with translated(self._peer):
            reply = await self._sandboxes.CreateSandboxes(request, timeout=CALL_TIMEOUT_S)
        return [_made(result) for result in reply.results]

    async def get_sandbox(self, name: str) -> Sandbox:
        """One sandbox now; raises NotFoundError."""
        with translated(self._peer):
            reply = await self._sandboxes.GetSandbox(self._name(name), timeout=CALL_TIMEOUT_S)
        return from_message(Sandbox, reply)

    async def list_sandboxes(self) -> list[Sandbox]:
        """The tenant's sandboxes; every tenant's for an operator who names none."""
        request = service_pb2.ListSandboxesRequest(tenant=self._tenant)
        with translated(self._peer):
            reply = await self._sandboxes.ListSandboxes(request, timeout=CALL_TIMEOUT_S)
        return [from_message(Sandbox, sandbox) for sandbox in reply.sandboxes]

    async def watch_sandbox(self, name: str) -> AsyncIterator[Sandbox]:
        """The sandbox now and after every change; ends when it is removed."""
        with translated(self._peer):
            async for reply in self._sandboxes.WatchSandbox(self._name(name), timeout=STREAM_TIMEOUT_S):
                yield from_message(Sandbox, reply)

    async def stop_sandbox(self, name: str) -> Sandbox:
        """Asks for the end of its VM."""
        with translated(self._peer):
            reply = await self._sandboxes.StopSandbox(self._name(name), timeout=CALL_TIMEOUT_S)
        return from_message(Sandbox, reply)

    async def start_sandbox(self, name: str) -> Sandbox:
        """Asks for the next run of a stopped sandbox; raises ConflictError `not_stopped`."""
        with translated(self._peer):
            reply = await self._sandboxes.StartSandbox(self._name(name), timeout=CALL_TIMEOUT_S)
        return from_message(Sandbox, reply)

    async def destroy_sandbox(self, name: str) -> Sandbox:
        """Asks for its removal."""
        with translated(self._peer):
            reply = await self._sandboxes.DestroySandbox(self._name(name), timeout=CALL_TIMEOUT_S)
        return from_message(Sandbox, reply)

    async def has_source(self, digest: Digest) -> bool:
        """Whether the fleet holds a source of this tenant's already."""
        request = content_pb2.HasSourceRequest(digest=digest, tenant=self._tenant)
        with translated(self._peer):
            return bool((await self._content.HasSource(request, timeout=CALL_TIMEOUT_S)).is_held)

    async def upload_source(self, packed: Packed, stream: BinaryIO, sent: Callable[[int], None]) -> None:
        """Sends a packed source and tells `sent` how many bytes are on their way; returns once a host holds it for good."""
        timeout_s = max(packed.size_bytes / BYTES_PER_S_MIN, TRANSFER_TIMEOUT_S_MIN)
        with translated(self._peer):
            await self._content.UploadSource(self._upload(packed, stream, sent), timeout=timeout_s)

    async def fetch_source(self, digest: Digest, tenant: Tenant) -> AsyncIterator[Chunk]:
        """The tar of a source of `tenant`, in chunks."""
        request = content_pb2.FetchSourceRequest(digest=digest, tenant=tenant)
        with translated(self._peer):
            async for reply in self._content.FetchSource(request, timeout=STREAM_TIMEOUT_S):
                yield Chunk(reply.offset, reply.payload, size_bytes=reply.size_bytes, digest=Digest(reply.digest))

    async def fetch_artifact(self, name: str) -> AsyncIterator[Chunk]:
        """A sandbox's artifact in chunks; raises NotFoundError while there is none."""
        request = content_pb2.FetchArtifactRequest(sandbox=name, tenant=self._tenant)
        with translated(self._peer):
            async for reply in self._content.FetchArtifact(request, timeout=STREAM_TIMEOUT_S):
                yield Chunk(reply.offset, reply.payload, size_bytes=reply.size_bytes, digest=Digest(reply.digest))

    def _name(self, name: str) -> Any:
        return service_pb2.GetSandboxRequest(sandbox=name, tenant=self._tenant)

    async def _upload(self, packed: Packed, stream: BinaryIO, sent: Callable[[int], None]) -> AsyncIterator[Any]:
        header = content_pb2.UploadSourceHeader(digest=packed.digest, size_bytes=packed.size_bytes, tenant=self._tenant)
        yield content_pb2.UploadSourceRequest(header=header)
        stream.seek(0)
        while chunk := stream.read(CHUNK_BYTES):
            yield content_pb2.UploadSourceRequest(chunk=chunk)
            sent(stream.tell())


@asynccontextmanager
async def open_client(config: ClientConfig) -> AsyncIterator[Client]:
    """A client of the configured schedulers; nothing is sent before its first call."""
    # A start that was answered by silence may have started the run, and would say of itself that it was not stopped.
    once = ("/bedplate.sandbox.v1.SandboxService/StartSandbox",)
    async with open_failover(config.addresses, config.tls, SCHEDULER_SERVER_NAME, once) as channel:
        yield Client(channel, config.peer, config.tenant)


def _made(result: Any) -> Sandbox | BedplateError:
    if not result.HasField("error"):
        return from_message(Sandbox, result.sandbox)
    error = result.error
    detail = {"code": error.code, "next_step": error.next_step, "field": error.field}
    return error_from_result(error.status, error.message, detail)
