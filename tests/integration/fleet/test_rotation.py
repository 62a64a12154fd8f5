"""Certificates that are replaced under running programs: real servers and channels, and no call is lost."""

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from bedplate.content.v1 import content_pb2, content_pb2_grpc
from fleet.certificates import create_authority, issue_certificate
from fleet.channels import live_channel
from fleet.credentials import LiveCredentials, install
from fleet.identity import SCHEDULER_SERVER_NAME, Identity, Role, TlsFiles
from fleet.server import start_server
from fleet.store.etcd import open_etcd
from fleet.store.keyspace import ROOT
from fleet.store.port import Put, StoreUnavailableError
from provisioning.embedded.etcd import LOOPBACK, free_ports, start_etcd
from provisioning.embedded.pki import add_certificate

pytestmark = pytest.mark.timeout(90)
HANG_S = 40.0
SERVICE = "bedplate.content.v1.ContentService"
PERMISSIONS = {f"{SERVICE}/{method}": frozenset({Role.TENANT}) for method in ("HasSource", "FetchSource")}
TENANT, SCHEDULER = Identity(Role.TENANT, "acme"), Identity(Role.SCHEDULER, "scheduler")


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Echo(content_pb2_grpc.ContentServiceServicer):
    """Answers with the serial of the caller's certificate; a fetch goes on for as long as it is told to."""

    def __init__(self) -> None:
        self.more: asyncio.Queue[bytes] = asyncio.Queue()

    async def HasSource(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's names)
        (shown,) = context.auth_context()["x509_pem_cert"]
        await context.send_initial_metadata((("serial", str(x509.load_pem_x509_certificate(shown).serial_number)),))
        return content_pb2.HasSourceResponse(is_held=True)

    async def FetchSource(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        while payload := await self.more.get():
            yield content_pb2.ContentChunk(payload=payload)


class Place:
    """An authority, and the files of two programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = create_authority(now())
        (folder / "ca.crt").write_bytes(self.authority.certificate)

    def issue(self, identity: Identity, lifetime: datetime.timedelta = datetime.timedelta(days=1)) -> TlsFiles:
        """Installs a new certificate of `identity`."""
        files = TlsFiles(
            self.folder / "ca.crt", self.folder / f"{identity.role}.crt", self.folder / f"{identity.role}.key"
        )
        install(files, issue_certificate(self.authority, identity, now(), ("127.0.0.1",), lifetime))
        return files


def serial_in(files: TlsFiles) -> int:
    return x509.load_pem_x509_certificate(files.certificate.read_bytes()).serial_number


@asynccontextmanager
async def serving(place: Place) -> AsyncIterator[tuple[str, Echo]]:
    """A server, its address and its behaviour."""
    echo = Echo()
    server, port = await start_server(
        f"{LOOPBACK}:0",
        place.issue(SCHEDULER),
        PERMISSIONS,
        lambda server: content_pb2_grpc.add_ContentServiceServicer_to_server(echo, server),
    )
    try:
        yield f"{LOOPBACK}:{port}", echo
    finally:
        await server.stop(None)


async def shown_by(address: str, files: TlsFiles) -> int:
    """The serial of the certificate with which a server answers a new connection."""
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(files.certificate, files.key)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=SCHEDULER_SERVER_NAME)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(shown).serial_number


async def until(ask: Callable[[], Awaitable[int]], wanted: int) -> None:
    """Asks until the answer is the wanted one: files are looked at once a second."""
    async with asyncio.timeout(HANG_S):
        while True:
            if await ask() == wanted:
                return
            await asyncio.sleep(0.1)


async def test_a_server_shows_its_new_certificate(tmp_path: Path) -> None:
    """At handshakes after the change; a call that began before goes on, and calls all along succeed."""
    place = Place(tmp_path)
    client = place.issue(TENANT)
    async with serving(place) as (address, echo):
        channel = live_channel(address, LiveCredentials(client), SCHEDULER_SERVER_NAME, HANG_S)
        stub = content_pb2_grpc.ContentServiceStub(channel.get())
        stream = stub.FetchSource(content_pb2.FetchSourceRequest(), timeout=HANG_S)
        echo.more.put_nowait(b"before")
        assert (await stream.read()).payload == b"before"
        renewed = serial_in(place.issue(SCHEDULER))
        assert (await stub.HasSource(content_pb2.HasSourceRequest(), timeout=HANG_S)).is_held
        await until(lambda: shown_by(address, client), renewed)
        echo.more.put_nowait(b"after")
        assert (await stream.read()).payload == b"after"
        echo.more.put_nowait(b"")
        assert await stream.read() is grpc.aio.EOF
        await channel.close()


async def test_a_client_shows_its_new_certificate(tmp_path: Path) -> None:
    """New calls carry it, a call under way ends on the old one, none fails, and the old channel is closed when it is empty."""
    place = Place(tmp_path)
    async with serving(place) as (address, echo):
        channel = live_channel(address, LiveCredentials(place.issue(TENANT)), SCHEDULER_SERVER_NAME, HANG_S)
        old = channel.get()
        stream = content_pb2_grpc.ContentServiceStub(old).FetchSource(content_pb2.FetchSourceRequest(), timeout=HANG_S)
        echo.more.put_nowait(b"before")
        assert (await stream.read()).payload == b"before"
        renewed = serial_in(place.issue(TENANT))

        async def serial_seen() -> int:
            call = content_pb2_grpc.ContentServiceStub(channel.get()).HasSource(content_pb2.HasSourceRequest())
            serial = dict(await call.initial_metadata())["serial"]
            assert (await call).is_held
            return int(serial)

        await until(serial_seen, renewed)
        assert channel.get() is not old
        echo.more.put_nowait(b"after")
        assert (await stream.read()).payload == b"after"
        echo.more.put_nowait(b"")
        assert await stream.read() is grpc.aio.EOF
        await channel.close()


async def test_a_call_that_lingers_too_long_is_ended(tmp_path: Path) -> None:
    """A retired channel is not kept for ever: its last calls are cancelled after their time."""
    place = Place(tmp_path)
    async with serving(place) as (address, echo):
        channel = live_channel(address, LiveCredentials(place.issue(TENANT)), SCHEDULER_SERVER_NAME, 0.1)
        stub = content_pb2_grpc.ContentServiceStub(channel.get())
        stream = stub.FetchSource(content_pb2.FetchSourceRequest(), timeout=HANG_S)
        echo.more.put_nowait(b"before")
        await stream.read()
        old = channel.get()
        place.issue(TENANT)

        async def is_new() -> int:
            return int(channel.get() is not old)

        await until(is_new, 1)
        with pytest.raises(asyncio.CancelledError):
            await stream.read()
        await channel.close()


@pytest.mark.root
async def test_the_store_outlives_a_certificate(tmp_path: Path) -> None:
    """etcd is used on while the certificate is replaced, and after the old one has ended and etcd itself was restarted."""
    place = Place(tmp_path)
    add_certificate(tmp_path, place.authority, Identity(Role.STORE, "etcd"), now())
    ports = free_ports(2)
    etcd = start_etcd(tmp_path / "etcd", tmp_path, *ports)
    old_ends = now() + datetime.timedelta(seconds=6)
    store = open_etcd([f"{LOOPBACK}:{ports[0]}"], place.issue(SCHEDULER, old_ends - now()))
    try:
        watched: list[bytes] = []

        async def watch() -> None:
            async with store.watch(ROOT, 1) as batches:
                async for batch in batches:
                    watched.extend(event.value for event in batch)

        watching = asyncio.create_task(watch())
        await store.transact([], [Put(ROOT + "a", b"before")])
        place.issue(SCHEDULER)
        count = 0
        while now() < old_ends:
            count += 1
            await store.transact([], [Put(ROOT + "a", str(count).encode())])
            await asyncio.sleep(0.1)

        async def seen() -> int:
            return len(watched)

        await until(seen, count + 1)
        assert watched[0] == b"before"
        etcd.stop()
        with pytest.raises(StoreUnavailableError):
            await watching
        etcd = start_etcd(tmp_path / "etcd", tmp_path, *ports)
        async with asyncio.timeout(HANG_S):
            while True:
                try:
                    found = await store.get(ROOT + "a")
                    break
                except StoreUnavailableError:
                    continue
        assert found is not None
        assert found.value == str(count).encode()
    finally:
        await store.close()
        etcd.stop()


async def test_one_authority_takes_over_from_another(tmp_path: Path) -> None:
    """While both are in the authority file, certificates of either are good on either side."""
    place = Place(tmp_path)
    old, new = place.authority, create_authority(now())
    for trusted in (old.certificate + new.certificate, new.certificate + old.certificate):
        (tmp_path / "ca.crt").write_bytes(trusted)
        for servers in (old, new):
            place.authority = servers
            async with serving(place) as (address, _):
                for clients in (old, new):
                    place.authority = clients
                    channel = live_channel(address, LiveCredentials(place.issue(TENANT)), SCHEDULER_SERVER_NAME, HANG_S)
                    stub = content_pb2_grpc.ContentServiceStub(channel.get())
                    assert (await stub.HasSource(content_pb2.HasSourceRequest(), timeout=HANG_S)).is_held
                    await channel.close()
