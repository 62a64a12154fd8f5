"""Takes sources in and gives sources and artifacts out, in chunks that name their offset. The receiver checks the digest."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from bedplate.content.v1 import content_pb2, content_pb2_grpc
from fleet.errors import InvalidSpecError, NotFoundError
from fleet.model.ids import Digest, SandboxId, Tenant, is_digest, is_dns_label
from fleet.rpc import CHUNK_BYTES
from hostd.orders import Orders


class SourcesHeld(Protocol):
    """The sources of this host."""

    def has(self, tenant: Tenant, digest: Digest) -> bool: ...
    def note_use(self, tenant: Tenant, digest: Digest) -> None: ...
    def tar_path(self, tenant: Tenant, digest: Digest) -> Path: ...
    async def put(self, tenant: Tenant, digest: Digest, size_bytes: int, chunks: AsyncIterator[bytes]) -> None: ...


class ContentService(content_pb2_grpc.ContentServiceServicer):
    """Content by digest, of the tenant that the scheduler vouches for."""

    def __init__(
        self,
        orders: Orders,
        sources: SourcesHeld,
        source_added: Callable[[Tenant, Digest], Any],
        hold_room: Callable[[Tenant, int], AbstractAsyncContextManager[None]],
    ) -> None:
        self._orders = orders
        self._sources = sources
        self._hold_room = hold_room
        self._source_added = source_added

    async def HasSource(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 (the stub's names)
        """Whether this host holds a source."""
        tenant, digest = _check_names(request.tenant, request.digest)
        # Who asks is about to use it.
        self._sources.note_use(tenant, digest)
        return content_pb2.HasSourceResponse(is_held=self._sources.has(tenant, digest))

    async def UploadSource(self, request_iterator: AsyncIterator[Any], context: Any) -> Any:  # noqa: ARG002, N802
        """Takes a source in, and returns once it is durable and registered."""
        first = await anext(request_iterator, content_pb2.UploadSourceRequest())
        header = first.header
        tenant, digest = _check_names(header.tenant, header.digest)
        self._sources.note_use(tenant, digest)
        was_held = self._sources.has(tenant, digest)
        async with nullcontext() if was_held else self._hold_room(tenant, header.size_bytes):
            await self._sources.put(tenant, digest, header.size_bytes, _chunks(request_iterator))
        await self._source_added(tenant, digest)
        return content_pb2.UploadSourceResponse(digest=digest, was_held=was_held)

    async def FetchSource(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002, N802
        """A source as it was received."""
        tenant, digest = _check_names(request.tenant, request.digest)
        async for chunk in _send(self._sources.tar_path(tenant, digest), digest):
            yield chunk

    async def FetchArtifact(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002, N802
        """A sandbox's artifact."""
        sandbox_id = SandboxId(request.sandbox)
        order, progress = self._orders.orders.get(sandbox_id), self._orders.progress.get(sandbox_id)
        if order is None or progress is None or order.tenant != request.tenant:
            raise NotFoundError("sandbox_unknown", f"sandbox {sandbox_id} is not on this host", "see mb ls")
        if progress.artifact is None:
            next_step = "wait until its agents have ended: mb status shows it"
            raise NotFoundError("artifact_missing", f"sandbox {order.spec.name} has no artifact", next_step)
        try:
            async for chunk in _send(self._orders.artifact_path(sandbox_id), progress.artifact.digest):
                yield chunk
        except FileNotFoundError as error:
            raise NotFoundError("sandbox_unknown", f"sandbox {sandbox_id} was removed", "see mb ls") from error


def _check_names(tenant: str, digest: str) -> tuple[Tenant, Digest]:
    if not is_dns_label(tenant):
        raise InvalidSpecError("tenant_invalid", "it is no tenant's name", "name a tenant", field="tenant")
    if not is_digest(digest):
        raise InvalidSpecError("digest_invalid", "it is no digest", "write sha256: and 64 hex digits", field="digest")
    return Tenant(tenant), Digest(digest)


async def _chunks(requests: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request.chunk


async def _send(path: Path, digest: Digest) -> AsyncIterator[Any]:
    size_bytes, offset = (await asyncio.to_thread(path.stat)).st_size, 0
    with path.open("rb") as stream:
        while chunk := await asyncio.to_thread(stream.read, CHUNK_BYTES):
            yield content_pb2.ContentChunk(offset=offset, payload=chunk, size_bytes=size_bytes, digest=digest)
            offset += len(chunk)
