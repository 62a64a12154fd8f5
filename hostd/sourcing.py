"""Where sources come from: this host's own store, or another host that has them. Tells the store what this host holds.

Hosts fetch from each other directly, with their own certificates; what arrives is verified by its digest before it counts.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol
from weakref import WeakValueDictionary

import grpc
import structlog

from bedplate.content.v1 import content_pb2, content_pb2_grpc
from fleet.codec import decode
from fleet.credentials import LiveCredentials
from fleet.errors import BedplateError, HostFaultError, NotFoundError, UnavailableError
from fleet.identity import TlsFiles, host_server_name
from fleet.model.host import HostRecord
from fleet.model.ids import Digest, HostId, Tenant, digest_hex
from fleet.rpc import open_channel, translated
from fleet.store.keyspace import SOURCES, alive_key, host_key, source_hosts, source_key
from fleet.store.port import TRANSACTION_OPS_MAX, Delete, Put, Store, Write
from hostd.room import Room

# The largest source (2 GiB) over a gigabit takes 20 s; ten minutes are enough for the slowest network.
FETCH_TIMEOUT_S = 600.0
# A peer that sends nothing for so long hangs, and another one is asked.
SILENCE_TIMEOUT_S = 30.0

log = structlog.get_logger()


class LocalSources(Protocol):
    """This host's own store of sources."""

    def has(self, tenant: Tenant, digest: Digest) -> bool: ...
    def list_sources(self) -> list[tuple[Tenant, Digest]]: ...
    def note_use(self, tenant: Tenant, digest: Digest) -> None: ...
    async def put(self, tenant: Tenant, digest: Digest, size_bytes: int, chunks: AsyncIterator[bytes]) -> None: ...
    async def ensure_disk(self, tenant: Tenant, digest: Digest) -> str: ...


class Sourcing:
    """The sources of this host and, through them, of the fleet."""

    def __init__(
        self,
        host_id: HostId,
        store: Store,
        local: LocalSources,
        tls: TlsFiles,
        room: Room,
        *,
        silence_s: float = SILENCE_TIMEOUT_S,
    ) -> None:
        self._host_id = host_id
        self._store = store
        self._local = local
        self._credentials = LiveCredentials(tls)
        self._room = room
        self._silence_s = silence_s
        # Two sandboxes that start with the same source fetch it once; one that hangs holds up no other. A lock lives as long
        # as somebody holds it or waits for it, and those are as many as the reconciler's workers.
        self._fetches: WeakValueDictionary[tuple[Tenant, Digest], asyncio.Lock] = WeakValueDictionary()

    async def ensure_disk(self, tenant: Tenant, digest: Digest) -> str:
        """The path of the source's verified disk, fetched from another host first when this one lacks it."""
        if not self._local.has(tenant, digest):
            await self._fetch_once(tenant, digest)
        try:
            return await self._local.ensure_disk(tenant, digest)
        except HostFaultError:
            if not self._local.has(tenant, digest):
                # Thrown away: who sends it again must not be told that it is here.
                await self._store.transact([], [Delete(source_key(tenant, digest_hex(digest), self._host_id))])
            raise

    async def tell(self, tenant: Tenant, digest: Digest) -> None:
        """Notes in the store that this host holds a source."""
        await self._store.transact([], [Put(source_key(tenant, digest_hex(digest), self._host_id), b"")])

    async def tell_all(self) -> None:
        """Makes the store's notes about this host equal to what it holds."""
        listing = await self._store.list_prefix(SOURCES)
        told = {entry.key for entry in listing.entries if entry.key.endswith(f"/{self._host_id}")}
        held = {source_key(tenant, digest_hex(digest), self._host_id) for tenant, digest in self._local.list_sources()}
        writes: list[Write] = [Put(key, b"") for key in sorted(held - told)]
        writes += [Delete(key) for key in sorted(told - held)]
        for start in range(0, len(writes), TRANSACTION_OPS_MAX):
            await self._store.transact([], writes[start : start + TRANSACTION_OPS_MAX])

    async def _fetch_once(self, tenant: Tenant, digest: Digest) -> None:
        lock = self._fetches.setdefault((tenant, digest), asyncio.Lock())
        async with lock:
            if not self._local.has(tenant, digest):
                await self._fetch(tenant, digest)
                await self.tell(tenant, digest)

    async def _fetch(self, tenant: Tenant, digest: Digest) -> None:
        peers = await self._peers(tenant, digest)
        error: BedplateError = NotFoundError(
            "source_unknown", f"no other host has source {digest}", "submit it again: mb up sends it anew"
        )
        for peer in peers:
            try:
                await self._fetch_from(peer, tenant, digest)
            except BedplateError as failure:
                log.warning(
                    "source.unfetched", peer=peer.host_id, digest=digest, code=failure.code, error=failure.message
                )
                error = UnavailableError(failure.code, failure.message, "it is tried again")
            else:
                log.info("source.fetched", peer=peer.host_id, digest=digest)
                return
        raise error

    async def _peers(self, tenant: Tenant, digest: Digest) -> list[HostRecord]:
        """The hosts that say they hold the source, the live ones first: one that is cut off from the store may answer here."""
        listing = await self._store.list_prefix(source_hosts(tenant, digest_hex(digest)))
        names = [HostId(entry.key.rsplit("/", 1)[-1]) for entry in listing.entries]
        alive: list[HostRecord] = []
        away: list[HostRecord] = []
        for host_id in names:
            record = await self._store.get(host_key(host_id))
            if host_id != self._host_id and record:
                is_alive = await self._store.get(alive_key(host_id)) is not None
                (alive if is_alive else away).append(decode(HostRecord, record.value))
        return [*alive, *away]

    async def _fetch_from(self, peer: HostRecord, tenant: Tenant, digest: Digest) -> None:
        request = content_pb2.FetchSourceRequest(tenant=tenant, digest=digest)
        async with open_channel(peer.address, self._credentials, host_server_name(peer.host_id)) as channel:
            with translated(f"host {peer.host_id}"):
                call = content_pb2_grpc.ContentServiceStub(channel).FetchSource(request, timeout=FETCH_TIMEOUT_S)
                first = await self._read(call)
                if first is grpc.aio.EOF:
                    raise UnavailableError("source_empty", f"host {peer.host_id} sent nothing", "it is tried again")
                async with self._room.hold(tenant, first.size_bytes):
                    await self._local.put(tenant, digest, first.size_bytes, self._chunks(first, call))

    async def _chunks(self, first: Any, call: Any) -> AsyncIterator[bytes]:
        chunk = first
        while chunk is not grpc.aio.EOF:
            yield chunk.payload
            chunk = await self._read(call)

    async def _read(self, call: Any) -> Any:
        try:
            async with asyncio.timeout(self._silence_s):
                return await call.read()
        except TimeoutError as error:
            call.cancel()
            message = f"the other host sent nothing for {self._silence_s:.0f} s"
            raise UnavailableError("source_stalled", message, "it is tried again") from error
