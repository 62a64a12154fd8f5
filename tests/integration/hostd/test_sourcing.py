"""Hosts fetch sources from each other over mutual TLS, and give each other nothing else."""

import asyncio
import datetime
import hashlib
import io
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from bedplate.content.v1 import content_pb2, content_pb2_grpc
from fleet.certificates import create_authority
from fleet.codec import encode
from fleet.errors import NotFoundError, NotPermittedError, UnavailableError
from fleet.identity import Identity, Role, host_server_name
from fleet.model.admission import SOURCE_BYTES_MAX
from fleet.model.host import Accelerator, Capacity, HostAlive, HostRecord
from fleet.model.ids import Digest, HostId, Tenant, digest_hex
from fleet.model.units import MIB
from fleet.rpc import open_channel, translated
from fleet.server import start_server
from fleet.store.keyspace import alive_key, host_key, source_key
from fleet.store.memory import MemoryStore
from fleet.store.port import Put
from hostd.api.content import ContentService
from hostd.api.permissions import PERMISSIONS
from hostd.drivers.image import SourceStore
from hostd.orders import Orders
from hostd.room import Room, SourceSettings
from hostd.sourcing import Sourcing
from provisioning.embedded.pki import add_certificate, tls_files

# mkfs.erofs makes a source's disk.
pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]
ACME = Tenant("acme")
HERE, THERE = HostId("here"), HostId("there")
CALL_S = 20.0


def pack(text: str) -> tuple[Digest, bytes]:
    """A source of one file, and its digest."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("text")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text.encode()))
    content = packed.getvalue()
    return Digest("sha256:" + hashlib.sha256(content).hexdigest()), content


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


class Rack:
    """Two hosts with one store and one authority; `there` serves, `here` fetches."""

    def __init__(self, folder: Path) -> None:
        self.store = MemoryStore(monotonic)
        self.pki = folder / "pki"
        self.pki.mkdir()
        authority, now = create_authority(datetime.datetime.now(datetime.UTC)), datetime.datetime.now(datetime.UTC)
        (self.pki / "ca.crt").write_bytes(authority.certificate)
        for host_id in (HERE, THERE):
            add_certificate(self.pki, authority, Identity(Role.HOST, host_id), now)
        self.stores = {host_id: SourceStore(folder / host_id / "sources") for host_id in (HERE, THERE)}
        self.orders = Orders(folder / "state")
        self.named: set[tuple[Tenant, Digest]] = set()
        self.now_s = time.time()
        self.rooms = {host_id: self.room(host_id) for host_id in (HERE, THERE)}
        self.there = Sourcing(THERE, self.store, self.stores[THERE], self.tls(THERE), self.rooms[THERE])
        self.here = Sourcing(HERE, self.store, self.stores[HERE], self.tls(HERE), self.rooms[HERE], silence_s=1.0)
        self.address = ""
        self.server: Any = None

    def room(self, host_id: HostId) -> Room:
        """Room for a MiB of each tenant's sources, which stay for an hour after their last use."""
        settings = SourceSettings(quota_mib=1)
        return Room(
            host_id, self.store, self.stores[host_id], settings, named=lambda: self.named, clock=lambda: self.now_s
        )

    def tls(self, host_id: HostId) -> Any:
        return tls_files(self.pki, Role.HOST, host_id)

    async def serve(self, content: Any = None) -> None:
        """Serves `there`; `content` replaces its content service."""
        service = content or ContentService(self.orders, self.stores[THERE], self.there.tell, self.rooms[THERE].hold)

        def register(server: Any) -> None:
            content_pb2_grpc.add_ContentServiceServicer_to_server(service, server)

        self.server, port = await start_server("127.0.0.1:0", self.tls(THERE), PERMISSIONS, register)
        self.address = f"127.0.0.1:{port}"
        record = HostRecord(
            THERE, self.address, Capacity(1, 1, 1, 1), (), (), Accelerator.SIMULATED, "", (), "0.1.0", 0
        )
        alive = HostAlive(THERE, "boot", 1)
        await self.store.transact([], [Put(host_key(THERE), encode(record)), Put(alive_key(THERE), encode(alive))])

    async def hold(self, text: str) -> Digest:
        """A source that `there` holds and has told of."""
        digest, content = pack(text)
        await self.stores[THERE].put(ACME, digest, len(content), once(content))
        await self.there.tell(ACME, digest)
        return digest


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[Rack]:
    """The rack; its server is stopped afterwards."""
    rack = Rack(tmp_path)
    yield rack
    if rack.server is not None:
        await rack.server.stop(None)


async def test_a_source_is_fetched_once_and_told_of(rack: Rack) -> None:
    """Three sandboxes that start at once with a source of another host's: one fetch, one disk, and the store knows."""
    await rack.serve()
    digest = await rack.hold("hello")
    paths = await asyncio.gather(*(rack.here.ensure_disk(ACME, digest) for _ in range(3)))
    assert len(set(paths)) == 1
    assert Path(paths[0]).read_bytes() == Path(await rack.there.ensure_disk(ACME, digest)).read_bytes()
    assert await rack.store.get(source_key(ACME, digest_hex(digest), HERE)) is not None


async def test_nobody_has_it(rack: Rack) -> None:
    """A source that no living host has is told as such, with what to do: no retry heals it."""
    await rack.serve()
    with pytest.raises(NotFoundError) as caught:
        await rack.here.ensure_disk(ACME, pack("nowhere")[0])
    assert (caught.value.code, "mb up" in caught.value.next_step) == ("source_unknown", True)


async def test_another_tenants_source_is_not_fetched(rack: Rack) -> None:
    """Equal bytes of another tenant are another source."""
    await rack.serve()
    digest = await rack.hold("hello")
    with pytest.raises(NotFoundError):
        await rack.here.ensure_disk(Tenant("other"), digest)


async def test_a_host_that_is_gone_is_tried_again_later(rack: Rack) -> None:
    """A peer that does not answer is no reason to fail the sandbox for good."""
    await rack.serve()
    digest = await rack.hold("hello")
    await rack.server.stop(None)
    with pytest.raises(UnavailableError):
        await rack.here.ensure_disk(ACME, digest)
    await rack.serve()
    assert await rack.here.ensure_disk(ACME, digest)


class LyingContent(content_pb2_grpc.ContentServiceServicer):
    """A host that sends other bytes than asked for, or none at all."""

    def __init__(self, payload: bytes | None) -> None:
        self._payload = payload
        self.cancelled = asyncio.Event()

    async def FetchSource(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 (the stub's name)
        """Lies, or hangs until it is given up."""
        if self._payload is not None:
            yield content_pb2.ContentChunk(payload=self._payload, size_bytes=len(self._payload), digest=request.digest)
            return
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


async def test_what_a_host_sends_is_verified(rack: Rack) -> None:
    """A host that is taken over cannot slip another source under: what has the wrong digest is thrown away."""
    digest, content = pack("wanted")
    await rack.serve(LyingContent(b"x" * len(content)))
    await rack.there.tell(ACME, digest)
    with pytest.raises(UnavailableError) as caught:
        await rack.here.ensure_disk(ACME, digest)
    assert caught.value.code == "digest_mismatch"
    assert not rack.stores[HERE].has(ACME, digest)


async def test_a_silent_host_is_given_up(rack: Rack) -> None:
    """A peer that sends nothing is cancelled after a time, and meanwhile holds up no other source."""
    silent = LyingContent(None)
    await rack.serve(silent)
    digest, _ = pack("wanted")
    await rack.there.tell(ACME, digest)
    other, other_content = pack("here already")
    await rack.stores[HERE].put(ACME, other, len(other_content), once(other_content))
    waiting = asyncio.create_task(rack.here.ensure_disk(ACME, digest))
    assert await rack.here.ensure_disk(ACME, other)
    with pytest.raises(UnavailableError) as caught:
        await waiting
    assert caught.value.code == "source_stalled"
    async with asyncio.timeout(CALL_S):
        await silent.cancelled.wait()


async def test_the_store_is_told_what_is_held(rack: Rack) -> None:
    """At a start the notes about this host become what it holds; those of others stay."""
    digest = await rack.hold("hello")
    gone, theirs = source_key(ACME, "0" * 64, THERE), source_key(ACME, "0" * 64, HERE)
    await rack.store.transact([], [Put(gone, b""), Put(theirs, b"")])
    await rack.store.transact([], [Put(source_key(ACME, digest_hex(digest), THERE), b"")])
    await rack.there.tell_all()
    assert await rack.store.get(gone) is None
    assert await rack.store.get(theirs) is not None
    assert await rack.store.get(source_key(ACME, digest_hex(digest), THERE)) is not None


async def test_unused_sources_give_way_to_the_quota(rack: Rack) -> None:
    """Past a tenant's quota the one that was not used for longest goes, from the disk and from the store; what an order names, what
    was used lately and what is another tenant's stays, and then the upload is refused with what to do."""
    old, kept = await rack.hold("old"), await rack.hold("kept")
    room_bytes = MIB - next(one.size_bytes for one in rack.stores[THERE].list_held() if one.digest == kept)
    foreign, content = pack("foreign")
    await rack.stores[THERE].put(Tenant("other"), foreign, len(content), once(content))
    rack.named.add((ACME, kept))
    with pytest.raises(UnavailableError) as caught:
        await take_room(rack, MIB)
    assert caught.value.code == "sources_exhausted"
    rack.now_s += 3601
    await take_room(rack, room_bytes)
    assert [rack.stores[THERE].has(ACME, digest) for digest in (old, kept)] == [False, True]
    assert rack.stores[THERE].has(Tenant("other"), foreign)
    assert await rack.store.get(source_key(ACME, digest_hex(old), THERE)) is None
    assert await rack.store.get(source_key(ACME, digest_hex(kept), THERE)) is not None
    with pytest.raises(UnavailableError):
        await take_room(rack, MIB)
    assert rack.stores[THERE].has(ACME, kept)


async def test_uploads_at_the_same_time_count_together(rack: Rack) -> None:
    """Of two that fit one by one the second is refused while the first is under way; other tenants are not in its way."""
    room = rack.rooms[THERE]
    async with room.hold(ACME, MIB):
        with pytest.raises(UnavailableError):
            await take_room(rack, 1)
        async with room.hold(Tenant("other"), MIB):
            pass
    await take_room(rack, MIB)


async def test_nothing_gives_way_to_what_is_too_large(rack: Rack) -> None:
    """A size that no source may have is refused by whoever takes the source in; no other source goes for it."""
    old = await rack.hold("old")
    rack.now_s += 3601
    await take_room(rack, SOURCE_BYTES_MAX + 1)
    assert rack.stores[THERE].has(ACME, old)


async def take_room(rack: Rack, size_bytes: int) -> None:
    async with rack.rooms[THERE].hold(ACME, size_bytes):
        pass


async def test_a_host_gets_sources_and_nothing_else(rack: Rack) -> None:
    """With its own certificate a host cannot read an artifact elsewhere, push a source, or ask what another tenant has."""
    await rack.serve()
    digest = await rack.hold("hello")
    async with open_channel(rack.address, rack.tls(HERE), host_server_name(THERE)) as channel:
        stub = content_pb2_grpc.ContentServiceStub(channel)
        request = content_pb2.FetchSourceRequest(tenant=ACME, digest=digest)
        assert [chunk async for chunk in stub.FetchSource(request, timeout=CALL_S)]
        with pytest.raises(NotPermittedError), translated("there"):
            await stub.HasSource(content_pb2.HasSourceRequest(tenant=ACME, digest=digest), timeout=CALL_S)
        artifact = content_pb2.FetchArtifactRequest(sandbox="aaaaaaaaaaaa", tenant=ACME)
        with pytest.raises(NotPermittedError), translated("there"):
            [chunk async for chunk in stub.FetchArtifact(artifact, timeout=CALL_S)]
        with pytest.raises(NotPermittedError), translated("there"):
            await stub.UploadSource(_upload(digest), timeout=CALL_S)


async def _upload(digest: Digest) -> AsyncIterator[Any]:
    header = content_pb2.UploadSourceHeader(digest=digest, size_bytes=1, tenant=ACME)
    yield content_pb2.UploadSourceRequest(header=header)
