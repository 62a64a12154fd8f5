"""ContentService: passes sources on to a host and sources and artifacts back, each within its tenant. Stores nothing itself."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from bedplate.content.v1 import content_pb2, content_pb2_grpc
from fleet.errors import InvalidSpecError, NotFoundError, UnavailableError
from fleet.gatekeeper import caller_of
from fleet.identity import Identity
from fleet.model.admission import SOURCE_BYTES_MAX
from fleet.model.host import Reservation
from fleet.model.ids import Digest, HostId, Tenant, is_digest
from fleet.rpc import CHUNK_BYTES
from scheduler.api.access import find_sandbox, tenant_of
from scheduler.api.channels import HostChannels
from scheduler.api.copies import SourceCopies
from scheduler.api.lookup import fresh_with
from scheduler.api.relay import IDLE_S, TRANSFER_S, Slots, calling, relay
from scheduler.placement.snapshot import Snapshot, free_of
from scheduler.state import FleetState

# One caller's. Each holds a few chunks in memory and a stream to a host, whose disk is the bottleneck.
UPLOADS_MAX, DOWNLOADS_MAX = 16, 16
# The host's registration of a source is in the mirror within milliseconds.
REGISTERED_TIMEOUT_S = 10.0


class ContentService(content_pb2_grpc.ContentServiceServicer):
    """Relays of content."""

    def __init__(self, state: FleetState, channels: HostChannels, copies: SourceCopies) -> None:
        self._state = state
        self._channels = channels
        self._copies = copies
        self._uploads, self._downloads = Slots("uploads", UPLOADS_MAX), Slots("downloads", DOWNLOADS_MAX)

    async def HasSource(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's names)
        """Whether a live host holds the source."""
        tenant, digest = _check_source(caller_of(context), request)
        self._copies.want(tenant, digest)
        return content_pb2.HasSourceResponse(is_held=bool(live_holders(self._state.fresh(), tenant, digest)))

    async def UploadSource(self, request_iterator: AsyncIterator[Any], context: Any) -> Any:  # noqa: N802
        """Passes a source on to one host, and answers once a sandbox may name it."""
        self._uploads.take(context)
        header = await _read_header(request_iterator)
        tenant, digest = _check_source(caller_of(context), header)
        _check_size(header.size_bytes)
        snapshot = self._state.fresh()
        host_id = choose_holder(snapshot, tenant, digest)
        stub = content_pb2_grpc.ContentServiceStub(self._channels.channel(snapshot, host_id))
        header = content_pb2.UploadSourceHeader(digest=digest, size_bytes=header.size_bytes, tenant=tenant)
        with calling(host_id):
            call: Any = stub.UploadSource(timeout=TRANSFER_S)
            context.add_done_callback(lambda _context: call.cancel())
            try:
                response = await _pass_on(call, header, request_iterator)
            finally:
                call.cancel()
        await self._registered(tenant, digest, host_id)
        self._copies.want(tenant, digest)
        return response

    async def FetchSource(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """A source as it was uploaded."""
        self._downloads.take(context)
        tenant, digest = _check_source(caller_of(context), request)
        snapshot = self._state.fresh()
        holders = live_holders(snapshot, tenant, digest)
        if not holders:
            raise NotFoundError("source_unknown", f"no live host holds {digest}", "upload it again with mb up")
        stub = content_pb2_grpc.ContentServiceStub(self._channels.channel(snapshot, holders[0]))
        wanted = content_pb2.FetchSourceRequest(digest=digest, tenant=tenant)
        async for chunk in relay(stub.FetchSource(wanted, timeout=TRANSFER_S), holders[0], context):
            yield chunk

    async def FetchArtifact(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """What came out of a sandbox, from the host that ran it."""
        self._downloads.take(context)
        caller = caller_of(context)
        snapshot = await fresh_with(self._state, caller, request.sandbox, request.tenant)
        record = find_sandbox(snapshot, caller, request.sandbox, request.tenant)
        assignment = snapshot.assignment_of(record)
        if assignment is None:
            message = f"sandbox {record.spec.name} has not run, so nothing came out of it"
            raise NotFoundError("artifact_missing", message, "mb status shows why it has no host")
        stub = content_pb2_grpc.ContentServiceStub(self._channels.channel(snapshot, assignment.host_id))
        wanted = content_pb2.FetchArtifactRequest(sandbox=record.sandbox_id, tenant=record.tenant)
        async for chunk in relay(stub.FetchArtifact(wanted, timeout=TRANSFER_S), assignment.host_id, context):
            yield chunk

    async def _registered(self, tenant: Tenant, digest: Digest, host_id: HostId) -> None:
        try:
            async with asyncio.timeout(REGISTERED_TIMEOUT_S):
                while True:
                    changed = self._state.changed()
                    if host_id in self._state.snapshot().sources.get((tenant, digest), ()):
                        return
                    await changed.wait()
        except TimeoutError as error:
            message = f"host {host_id} took the source, but its registration was not seen"
            raise UnavailableError("source_unregistered", message, "upload it again") from error


def live_holders(snapshot: Snapshot, tenant: Tenant, digest: Digest) -> list[HostId]:
    """The live hosts that hold a tenant's source, by id."""
    return sorted(snapshot.sources.get((tenant, digest), frozenset()) & snapshot.alive & set(snapshot.hosts))


def choose_holder(snapshot: Snapshot, tenant: Tenant, digest: Digest) -> HostId:
    """The host that shall hold a source: one that does already, else the live one with the most free memory, then by id.

    Raises UnavailableError `no_host_alive` when there is none.
    """
    holders = live_holders(snapshot, tenant, digest)
    if holders:
        return holders[0]
    alive = sorted(snapshot.alive & set(snapshot.hosts))
    if not alive:
        raise UnavailableError("no_host_alive", "no host is alive to take the source", "see mb host ls")
    return min(alive, key=lambda host_id: (-_free_memory_mib(snapshot, host_id), host_id))


def _free_memory_mib(snapshot: Snapshot, host_id: HostId) -> int:
    reservation = snapshot.reservations.get(host_id, Reservation(host_id))
    return free_of(snapshot.hosts[host_id].capacity, reservation).memory_mib


def _check_source(caller: Identity, named: Any) -> tuple[Tenant, Digest]:
    tenant = tenant_of(caller, named.tenant)
    if not is_digest(named.digest):
        raise InvalidSpecError("digest_invalid", "it is no digest", "write sha256: and 64 hex digits", field="digest")
    return tenant, Digest(named.digest)


def _check_size(size_bytes: int) -> None:
    if not 1 <= size_bytes <= SOURCE_BYTES_MAX:
        message = f"{size_bytes} bytes are not 1 to {SOURCE_BYTES_MAX}"
        raise InvalidSpecError("source_too_large", message, "send less, or split it", field="size_bytes")


async def _read_header(requests: AsyncIterator[Any]) -> Any:
    first = await _next(requests)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidSpecError("header_missing", "an upload begins with its header", "send digest and size first")
    return first.header


async def _pass_on(call: Any, header: Any, requests: AsyncIterator[Any]) -> Any:
    """Sends header and chunks to the host, the next one only when it has taken the last; its answer.

    A host that has the source answers early. The client's chunks are read to their end nevertheless: gRPC clients that are
    answered in mid-write see an internal error instead of the answer.
    """
    response = None if await _write(call, content_pb2.UploadSourceRequest(header=header)) else await call
    left_bytes = header.size_bytes
    while (request := await _next(requests)) is not None:
        left_bytes -= len(request.chunk)
        if request.WhichOneof("part") != "chunk" or len(request.chunk) > CHUNK_BYTES or left_bytes < 0:
            message = f"a message is no chunk of at most {CHUNK_BYTES} bytes, or past the size in the header"
            raise InvalidSpecError("chunk_invalid", message, "send the source again")
        if response is None and not await _write(call, request):
            response = await call
    if response is None:
        await call.done_writing()
        response = await call
    return response


async def _next(requests: AsyncIterator[Any]) -> Any:
    try:
        async with asyncio.timeout(IDLE_S):
            return await anext(requests, None)
    except TimeoutError as error:
        message = f"nothing arrived for {IDLE_S:.0f} s"
        raise UnavailableError("upload_stalled", message, "send the source again") from error


async def _write(call: Any, request: Any) -> bool:
    """Whether the host took it; if not it has answered already, and awaiting the call tells what."""
    if call.done():
        return False
    try:
        async with asyncio.timeout(IDLE_S):
            await call.write(request)
    except TimeoutError as error:
        raise UnavailableError("host_silent", f"the host took nothing for {IDLE_S:.0f} s", "try again") from error
    except grpc.aio.AioRpcError:
        # What a failed write raises is gRPC's "internal error", not the host's answer.
        return False
    return True
