"""Calls between programs: who gets in, and how errors travel. A real server and real channels, over mutual TLS."""

import asyncio
import datetime
import gc
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bedplate.content.v1 import content_pb2, content_pb2_grpc
from fleet.certificates import create_authority, issue_certificate
from fleet.errors import (
    BedplateError,
    ConflictError,
    HostFaultError,
    InvalidSpecError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
)
from fleet.gatekeeper import ERROR_FIELD_CHARS_MAX, ERROR_MESSAGE_CHARS_MAX, caller_of
from fleet.identity import SCHEDULER_SERVER_NAME, Identity, Role, TlsFiles
from fleet.revocation import Revocations, serial_of
from fleet.rpc import CHUNK_BYTES, ERROR_KEY, MESSAGE_BYTES_MAX, error_from_call, open_channel, translated
from fleet.server import start_server

pytestmark = pytest.mark.timeout(60)
SERVICE = "bedplate.content.v1.ContentService"
ADMITTED = frozenset({Role.TENANT, Role.OPERATOR})
PERMISSIONS = {f"{SERVICE}/{method}": ADMITTED for method in ("HasSource", "UploadSource", "FetchSource")}
CALL_S = 20.0
LONG_AGO = datetime.timedelta(days=1000)


@dataclass
class Behaviour(content_pb2_grpc.ContentServiceServicer):
    """Answers with the caller's name, or raises what it is told to."""

    error: BaseException | None = None
    is_hanging: bool = False
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def HasSource(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's names)
        if self.is_hanging:
            await self._hang()
        if self.error is not None:
            raise self.error
        return content_pb2.HasSourceResponse(is_held=request.tenant == caller_of(context).name)

    async def UploadSource(self, request_iterator: AsyncIterator[Any], context: Any) -> Any:  # noqa: N802
        received = 0
        async for request in request_iterator:
            received += len(request.chunk)
            if self.error is not None:
                raise self.error
        return content_pb2.UploadSourceResponse(digest=str(received))

    async def FetchSource(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for offset in range(3):
            yield content_pb2.ContentChunk(offset=offset)
        if self.is_hanging:
            await self._hang()
        if self.error is not None:
            raise self.error

    async def _hang(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


class Certificates:
    """Certificates in files, of one authority or of others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self.now = datetime.datetime.now(datetime.UTC)
        self.authority = create_authority(self.now)

    def issue(self, role: Role, name: str, **changes: Any) -> TlsFiles:
        authority, now = changes.get("authority", self.authority), changes.get("now", self.now)
        pair = issue_certificate(authority, Identity(role, name), now, ("127.0.0.1",))
        return self.write(changes.get("trusted", self.authority).certificate, pair.certificate, pair.key)

    def write(self, *contents: bytes) -> TlsFiles:
        self._count += 1
        paths = [self._folder / f"{self._count}.{suffix}" for suffix in ("ca", "crt", "key")]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        return TlsFiles(*paths)


@dataclass
class Served:
    """A server, how it behaves, and channels to it."""

    port: int
    behaviour: Behaviour
    certificates: Certificates
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    def channel(self, tls: TlsFiles, server_name: str = SCHEDULER_SERVER_NAME) -> grpc.aio.Channel:
        self.channels.append(open_channel(f"127.0.0.1:{self.port}", tls, server_name))
        return self.channels[-1]

    def stub(self, tls: TlsFiles | None = None) -> Any:
        return content_pb2_grpc.ContentServiceStub(self.channel(tls or self.certificates.issue(Role.TENANT, "acme")))


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A server of the scheduler's name that admits tenants and operators."""
    certificates, behaviour = Certificates(tmp_path), Behaviour()

    def register(server: grpc.aio.Server) -> None:
        content_pb2_grpc.add_ContentServiceServicer_to_server(behaviour, server)

    tls = certificates.issue(Role.SCHEDULER, "scheduler")
    server, port = await start_server("127.0.0.1:0", tls, PERMISSIONS, register)
    served = Served(port, behaviour, certificates)
    yield served
    for channel in served.channels:
        await channel.close()
    await server.stop(None)


async def ask(stub: Any, timeout_s: float = CALL_S) -> Any:
    with translated("peer"):
        return await stub.HasSource(content_pb2.HasSourceRequest(tenant="acme"), timeout=timeout_s)


async def upload(stub: Any, count: int = 1) -> Any:
    async def chunks() -> AsyncIterator[Any]:
        for _ in range(count):
            yield content_pb2.UploadSourceRequest(chunk=bytes(CHUNK_BYTES))

    with translated("peer"):
        return await stub.UploadSource(chunks(), timeout=CALL_S)


async def fetch(stub: Any) -> list[int]:
    offsets = []
    with translated("peer"):
        async for chunk in stub.FetchSource(content_pb2.FetchSourceRequest(), timeout=CALL_S):
            offsets.append(chunk.offset)
    return offsets


CALLS = {"unary": ask, "upload": upload, "stream": fetch}


async def refused(call: Any) -> BedplateError:
    with pytest.raises(BedplateError) as caught:
        await call
    return caught.value


async def test_calls_arrive(served: Served) -> None:
    """Each kind of call, and the caller is who the certificate says."""
    stub = served.stub()
    assert (await ask(stub)).is_held
    assert (await upload(stub, 5)).digest == str(5 * CHUNK_BYTES)
    assert await fetch(stub) == [0, 1, 2]
    assert not (await ask(served.stub(served.certificates.issue(Role.TENANT, "other")))).is_held


ERRORS = [
    InvalidSpecError("a_code", "it is wrong", "mend it", field="agents[0].name"),
    InvalidSpecError("a_code", "it is wrong", "mend it"),
    NotPermittedError("a_code", "not you", "ask"),
    NotFoundError("a_code", "not there: Ä\n\0", "look ✓"),
    ConflictError("a_code", "moved", "read again"),
    UnavailableError("a_code", "away", "later"),
    HostFaultError("a_code", "broke", ""),
]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_comes_back_as_it_was(served: Served, error: BedplateError, call: Callable[..., Any]) -> None:
    """Family, code, message, field and next step, from every kind of call; no text is parsed for it."""
    served.behaviour.error = error
    got = await refused(call(served.stub()))
    assert type(got) is type(error)
    assert (got.code, got.message, got.next_step) == (error.code, error.message, error.next_step)
    assert getattr(got, "field", "") == getattr(error, "field", "")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_a_surprise_tells_nothing(served: Served, call: Callable[..., Any]) -> None:
    """What nobody foresaw is an internal error; its text stays in the server's log."""
    served.behaviour.error = RuntimeError("secret")
    got = await refused(call(served.stub()))
    assert (type(got), got.code) == (BedplateError, "call_internal")
    assert "secret" not in got.message + got.next_step


async def test_an_error_of_no_family_is_internal(served: Served) -> None:
    """The base of the tree has no status of its own."""
    served.behaviour.error = BedplateError("odd", "odd", "odd")
    assert (await refused(ask(served.stub()))).code == "call_internal"


@pytest.mark.parametrize("text", ["x", "Ä", "\U0001f600", "\udcff", "\n"])
async def test_the_longest_error_arrives(served: Served, text: str) -> None:
    """However long and however wide its texts: cut, but with its family and code. Headers have limits."""
    served.behaviour.error = InvalidSpecError("a_code", text * 100_000, text * 100_000, field=text * 100_000)
    got = await refused(ask(served.stub()))
    assert (type(got), got.code) == (InvalidSpecError, "a_code")
    assert 0 < len(got.message) <= ERROR_MESSAGE_CHARS_MAX + ERROR_FIELD_CHARS_MAX + len(": ")


@pytest.mark.parametrize("role", sorted(set(Role) - ADMITTED))
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_a_role_that_may_not(served: Served, role: Role, call: Callable[..., Any]) -> None:
    """The error says which roles may; the service is not reached."""
    served.behaviour.error = AssertionError("reached")
    got = await refused(call(served.stub(served.certificates.issue(role, "x"))))
    assert (type(got), got.code) == (NotPermittedError, "role_not_permitted")
    assert "operator or tenant" in got.next_step


async def test_a_certificate_without_an_identity(served: Served) -> None:
    """Signed by the authority is not enough: the authority's own certificate is nobody."""
    authority = served.certificates.authority
    tls = served.certificates.write(authority.certificate, authority.certificate, authority.key)
    got = await refused(ask(served.stub(tls)))
    assert isinstance(got, NotPermittedError | UnavailableError)


STRANGERS: dict[str, Callable[[Certificates], TlsFiles]] = {
    "foreign authority": lambda own: own.issue(Role.TENANT, "acme", authority=create_authority(own.now)),
    "expired": lambda own: own.issue(Role.TENANT, "acme", now=own.now - LONG_AGO),
    "not yet good": lambda own: own.issue(Role.TENANT, "acme", now=own.now + LONG_AGO),
    "expects another authority": lambda own: own.issue(Role.TENANT, "acme", trusted=create_authority(own.now)),
}


@pytest.mark.parametrize("make", STRANGERS.values(), ids=STRANGERS.keys())
async def test_a_stranger_is_refused_in_the_handshake(served: Served, make: Callable[[Certificates], TlsFiles]) -> None:
    """Before any call is heard; to the stranger the server is unreachable."""
    served.behaviour.error = AssertionError("reached")
    got = await refused(ask(served.stub(make(served.certificates))))
    assert (type(got), got.code) == (UnavailableError, "unreachable")


async def test_another_server_is_not_believed(served: Served) -> None:
    """A server must prove the name that is expected of it, whatever its address."""
    tls = served.certificates.issue(Role.TENANT, "acme")
    stub = content_pb2_grpc.ContentServiceStub(served.channel(tls, "local.host.bedplate"))
    assert (await refused(ask(stub))).code == "unreachable"


async def test_no_certificate_is_refused(served: Served) -> None:
    """A client that trusts the authority and shows nothing gets nowhere, health included."""
    ca = served.certificates.authority.certificate
    options = [("grpc.ssl_target_name_override", SCHEDULER_SERVER_NAME)]
    channel = grpc.aio.secure_channel(f"127.0.0.1:{served.port}", grpc.ssl_channel_credentials(ca), options=options)
    served.channels.append(channel)
    assert (await refused(ask(content_pb2_grpc.ContentServiceStub(channel)))).code == "unreachable"
    with pytest.raises(grpc.aio.AioRpcError):
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)


async def test_plaintext_is_refused(served: Served) -> None:
    """There is no mode without TLS."""
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{served.port}")
    served.channels.append(channel)
    assert (await refused(ask(content_pb2_grpc.ContentServiceStub(channel)))).code == "unreachable"


@pytest.mark.parametrize("role", Role)
async def test_health_and_reflection_answer_everyone_known(served: Served, role: Role) -> None:
    """Any certificate of the authority may ask whether a server is well and what it serves."""
    channel = served.channel(served.certificates.issue(role, "x"))
    for service in ("", SERVICE):
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=CALL_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    async def question() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    (answer,) = [one async for one in stub.ServerReflectionInfo(question(), timeout=CALL_S)]
    names = {service.name for service in answer.list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_calls_under_way_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """One caller's open calls, also those of services without a bound of their own, cost a server so much and no more."""
    monkeypatch.setattr("fleet.gatekeeper.CALLS_MAX", 3)
    tls, request = served.certificates.issue(Role.TENANT, "acme"), health_pb2.HealthCheckRequest()
    stub = health_pb2_grpc.HealthStub(served.channel(tls))
    watches = [stub.Watch(request) for _ in range(3)]
    for watch in watches:
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    assert (await refused(ask(served.stub(tls)))).code == "calls_exhausted"
    assert await ask(served.stub(served.certificates.issue(Role.TENANT, "other")))
    watches[0].cancel()
    async with asyncio.timeout(CALL_S):
        while not await is_let_in(served.stub(tls)):
            pass


async def is_let_in(stub: Any) -> bool:
    try:
        await ask(stub)
    except UnavailableError as error:
        return error.code != "calls_exhausted"
    return True


async def test_a_method_that_is_none(served: Served) -> None:
    """An unknown method is an error of the caller's release, and no crash."""
    channel = served.channel(served.certificates.issue(Role.TENANT, "acme"))
    for path in (f"/{SERVICE}/Nothing", "/nothing/at.all", "/x"):
        call = channel.unary_unary(path)
        with pytest.raises(BedplateError) as caught, translated("peer"):
            await call(b"", timeout=CALL_S)
        assert caught.value.code == "call_unimplemented"


@pytest.mark.parametrize("role", Role)
async def test_a_method_that_is_in_no_table(served: Served, role: Role) -> None:
    """A method that is served and that the table forgot is denied to every role."""
    stub = served.stub(served.certificates.issue(role, "x"))
    with pytest.raises(NotPermittedError) as caught, translated("peer"):
        await stub.FetchArtifact(content_pb2.FetchArtifactRequest(), timeout=CALL_S).read()
    assert (caught.value.code, caught.value.next_step) == ("role_not_permitted", "no role may call it")


@pytest.mark.parametrize("call", [ask, fetch], ids=["unary", "stream"])
async def test_a_caller_that_leaves_is_let_go(served: Served, call: Callable[..., Any]) -> None:
    """A cancelled call ends its work on the server."""
    served.behaviour.is_hanging = True
    asking = asyncio.create_task(call(served.stub()))
    await served.behaviour.begun.wait()
    asking.cancel()
    await served.behaviour.left.wait()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_an_answer_that_does_not_come(served: Served) -> None:
    """A deadline is an unavailable peer, with its name."""
    served.behaviour.is_hanging = True
    got = await refused(ask(served.stub(), timeout_s=0.3))
    assert (type(got), got.code, "peer" in got.message) == (UnavailableError, "deadline_exceeded", True)


async def test_nobody_there(served: Served) -> None:
    """A port that nobody serves is an unreachable peer."""
    tls = served.certificates.issue(Role.TENANT, "acme")
    async with open_channel("127.0.0.1:1", tls, SCHEDULER_SERVER_NAME) as channel:
        got = await refused(ask(content_pb2_grpc.ContentServiceStub(channel)))
    assert (type(got), got.code) == (UnavailableError, "unreachable")


async def test_a_message_past_the_limit(served: Served) -> None:
    """Refused by its size, on either side, and the server goes on."""
    stub = served.stub()
    huge = content_pb2.HasSourceRequest(tenant="x" * (MESSAGE_BYTES_MAX + 1))
    with pytest.raises(BedplateError) as caught, translated("peer"):
        await stub.HasSource(huge, timeout=CALL_S)
    assert caught.value.code == "call_resource_exhausted"
    assert (await ask(stub)).is_held


async def test_an_address_that_is_taken(served: Served) -> None:
    """A second server on the same port is told so, and does not share it."""
    tls = served.certificates.issue(Role.SCHEDULER, "scheduler")
    with pytest.raises(UnavailableError) as caught:
        await start_server(f"127.0.0.1:{served.port}", tls, {}, lambda server: None)
    assert (caught.value.code, str(served.port) in caught.value.message) == ("address_in_use", True)
    # What was begun of it is gone without a warning.
    gc.collect()


@dataclass
class Failed:
    """A failed call as a peer of another make may answer it."""

    trailing: Any

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.NOT_FOUND

    def details(self) -> str | None:
        return None

    def trailing_metadata(self) -> Any:
        return self.trailing


@pytest.mark.parametrize(
    "trailing",
    [
        None,
        (),
        ((ERROR_KEY, b"\xff"),),
        ((ERROR_KEY, b"{"),),
        ((ERROR_KEY, b"[]"),),
        ((ERROR_KEY, b"[" * 10_000),),
        (("x", b"{}"),),
    ],
)
def test_a_peer_without_our_words(trailing: Any) -> None:
    """Missing or broken details make a plain error, never another one."""
    assert error_from_call(Failed(trailing), "peer").code == "call_not_found"


def test_details_of_any_type() -> None:
    """What stands in them is taken as text."""
    got = error_from_call(Failed(((ERROR_KEY, b'{"code": 1, "field": null, "next_step": []}'),)), "peer")
    assert (type(got), got.code, got.next_step) == (NotFoundError, "1", "[]")


async def test_nobody_is_served_before_revocations_are_known(tmp_path: Path) -> None:
    """A server that was just started, and whose store is away, would let a withdrawn certificate in: it says to try again."""
    certificates, behaviour, revocations = Certificates(tmp_path), Behaviour(), Revocations()
    tls = certificates.issue(Role.SCHEDULER, "scheduler")
    server, port = await start_server(
        "127.0.0.1:0",
        tls,
        PERMISSIONS,
        lambda server: content_pb2_grpc.add_ContentServiceServicer_to_server(behaviour, server),
        revocations,
    )
    served = Served(port, behaviour, certificates)
    tenant = certificates.issue(Role.TENANT, "acme")
    stub = served.stub(tenant)
    got = await refused(ask(stub))
    assert (type(got), got.code) == (UnavailableError, "store_unavailable")
    health = health_pb2_grpc.HealthStub(served.channel(tenant))
    assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)).status
    revocations.replace(frozenset(), {})
    assert (await ask(stub)).is_held
    serial = int(serial_of(tenant.certificate.read_bytes()), 16)
    revocations.replace(frozenset([serial]), {})
    assert (await refused(ask(stub))).code == "certificate_revoked"
    for channel in served.channels:
        await channel.close()
    await server.stop(None)


@pytest.mark.parametrize("call", [ask, fetch], ids=["unary", "stream"])
async def test_a_call_under_way_ends_with_its_certificate(tmp_path: Path, call: Callable[..., Any]) -> None:
    """Whatever it waits for: its work on the server ends, and the caller is told why."""
    certificates, behaviour, revocations = Certificates(tmp_path), Behaviour(is_hanging=True), Revocations()
    revocations.replace(frozenset(), {})
    server, port = await start_server(
        "127.0.0.1:0",
        certificates.issue(Role.SCHEDULER, "scheduler"),
        PERMISSIONS,
        lambda server: content_pb2_grpc.add_ContentServiceServicer_to_server(behaviour, server),
        revocations,
    )
    served = Served(port, behaviour, certificates)
    tenant = certificates.issue(Role.TENANT, "acme")
    calling = asyncio.create_task(refused(call(served.stub(tenant))))
    await behaviour.begun.wait()
    revocations.replace(frozenset([int(serial_of(tenant.certificate.read_bytes()), 16)]), {})
    await behaviour.left.wait()
    assert (await calling).code == "certificate_revoked"
    for channel in served.channels:
        await channel.close()
    await server.stop(None)
