"""hostd's services over real gRPC and mutual TLS: output and content, to callers that may be wrong or lying."""

import datetime
import hashlib
import io
import tarfile
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from bedplate.content.v1 import content_pb2, content_pb2_grpc
from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.certificates import create_authority
from fleet.errors import BedplateError, InvalidSpecError, NotFoundError
from fleet.identity import Identity, Role, host_server_name
from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Agent, Artifact, Goal, Reason, SandboxSpec
from fleet.rpc import CHUNK_BYTES, open_channel, translated
from fleet.server import start_server
from fleet.store.memory import MemoryStore
from hostd.api.changes import Changes
from hostd.api.content import ContentService
from hostd.api.output import OutputService
from hostd.api.permissions import PERMISSIONS
from hostd.drivers.image import SourceStore
from hostd.orders import Orders
from hostd.reconcile.progress import begin, fail, reach_stage
from hostd.reconcile.words import OUTPUT_BYTES_MAX
from hostd.room import Room, SourceSettings
from provisioning.embedded.pki import add_certificate, tls_files
from tests.integration.hostd.parts import ACME, HOST, A, B

pytestmark = pytest.mark.timeout(60)
DIGEST = Digest("sha256:" + "0" * 64)
CALL_S = 20.0
TEXT = bytes(range(256)) * (CHUNK_BYTES // 200)


@dataclass
class Api:
    """One host's services and a scheduler's view of them."""

    orders: Orders
    sources: SourceStore
    changes: Changes
    added: list[tuple[Tenant, Digest]]
    output: Any = None
    content: Any = None

    def progress(self, sandbox_id: SandboxId, **changes: Any) -> None:
        self.orders.put_progress(replace(self.orders.progress[sandbox_id], **changes))
        self.changes.nudge()

    def write(self, content: bytes, agent: str = "one") -> None:
        with self.orders.output_path(A, agent).open("ab") as stream:
            stream.write(content)
        self.changes.nudge()

    def read_output(self, **fields: Any) -> Any:
        request = service_pb2.ReadOutputRequest(**{"sandbox": A, "tenant": ACME, "agent": "one", **fields})
        return self.output.ReadOutput(request, timeout=CALL_S)


def order(sandbox_id: SandboxId, *agents: str) -> Assignment:
    spec = SandboxSpec("box", agents=tuple(Agent(name, "custom", ("true",)) for name in agents))
    return Assignment(sandbox_id, ACME, HOST, spec, DIGEST, 64, Goal.RUN, 1, 1, 1)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """A host with sandbox A (agents one and two) and sandbox B (agent one)."""
    orders, sources, changes = Orders(tmp_path / "state"), SourceStore(tmp_path / "sources"), Changes()
    for taken in (order(A, "one", "two"), order(B, "one")):
        orders.put_progress(begin(taken, "", ""))
        orders.put_order(taken)
    api = Api(orders, sources, changes, [])
    now, authority, pki = (
        datetime.datetime.now(datetime.UTC),
        create_authority(datetime.datetime.now(datetime.UTC)),
        tmp_path,
    )
    (pki / "ca.crt").write_bytes(authority.certificate)
    for identity in (Identity(Role.HOST, HOST), Identity(Role.SCHEDULER, "scheduler")):
        add_certificate(pki, authority, identity, now)

    async def source_added(tenant: Tenant, digest: Digest) -> None:
        api.added.append((tenant, digest))

    def register(server: grpc.aio.Server) -> None:
        service_pb2_grpc.add_OutputServiceServicer_to_server(OutputService(orders, changes), server)
        room = Room(HostId(HOST), MemoryStore(time.monotonic), sources, SourceSettings(), named=orders.named_sources)
        content = ContentService(orders, sources, source_added, room.hold)
        content_pb2_grpc.add_ContentServiceServicer_to_server(content, server)

    server, port = await start_server("127.0.0.1:0", tls_files(pki, Role.HOST, HOST), PERMISSIONS, register)
    tls = tls_files(pki, Role.SCHEDULER, "scheduler")
    async with open_channel(f"127.0.0.1:{port}", tls, host_server_name(HOST)) as channel:
        api.output = service_pb2_grpc.OutputServiceStub(channel)
        api.content = content_pb2_grpc.ContentServiceStub(channel)
        yield api
    await server.stop(None)


async def collect(call: Any) -> tuple[bytes, bool]:
    """All payloads, which follow each other without a gap, and whether the end was told."""
    content, end, start = b"", False, None
    with translated("host"):
        while (chunk := await call.read()) is not grpc.aio.EOF:
            start = chunk.offset if start is None else start
            assert chunk.offset == start + len(content)
            assert len(chunk.payload) <= CHUNK_BYTES
            content, end = content + chunk.payload, chunk.end
    return content, end


async def refusal(awaitable: Any) -> BedplateError:
    with pytest.raises(BedplateError) as caught, translated("host"):
        await awaitable
    return caught.value


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, len(TEXT) - 1, len(TEXT), len(TEXT) + 5])
async def test_output_from_any_offset(api: Api, offset: int) -> None:
    """In chunks that name their place; a running agent's output has no end yet."""
    api.write(TEXT)
    assert await collect(api.read_output(offset=offset)) == (TEXT[offset:], False)


async def test_no_output_yet(api: Api) -> None:
    """An agent that has printed nothing has an empty output, not an error."""
    assert await collect(api.read_output()) == (b"", False)


async def test_output_is_followed_to_its_end(api: Api) -> None:
    """What is written while it is followed comes, also when it comes together with the end."""
    call = api.read_output(follow=True)
    api.write(b"one ")
    assert (await call.read()).payload == b"one "
    api.write(b"two ")
    assert (await call.read()).payload == b"two "
    api.write(b"three")
    api.orders.put_progress(reach_stage(api.orders.progress[A], "agents_ended", 1))
    api.changes.nudge()
    assert await collect(call) == (b"three", True)


@pytest.mark.parametrize("how", ["failure", "artifact", "removal"])
async def test_a_follower_is_not_left_waiting(api: Api, how: str) -> None:
    """However a sandbox ends, whoever follows its output is told."""
    api.write(b"last")
    call = api.read_output(follow=True)
    assert (await call.read()).payload == b"last"
    if how == "failure":
        api.orders.put_progress(fail(api.orders.progress[A], Reason("bad", "it is bad")))
    elif how == "artifact":
        api.progress(A, artifact=Artifact(DIGEST, 1, 0))
    else:
        api.orders.remove_folder(A)
    api.changes.nudge()
    assert await collect(call) == (b"", True)


async def test_the_only_agent_needs_no_name(api: Api) -> None:
    """With one agent the name may be left out, with two it may not."""
    assert await collect(api.read_output(sandbox=B, agent="")) == (b"", False)
    error = await refusal(api.read_output(agent="").read())
    assert isinstance(error, InvalidSpecError)
    assert (error.code, error.field) == ("agent_unknown", "agent")


@pytest.mark.parametrize(
    ("fields", "code", "family"),
    [
        ({"agent": "three"}, "agent_unknown", InvalidSpecError),
        ({"agent": "../progress"}, "agent_unknown", InvalidSpecError),
        ({"tenant": "other"}, "sandbox_unknown", NotFoundError),
        ({"tenant": ""}, "sandbox_unknown", NotFoundError),
        ({"sandbox": "c" * 12}, "sandbox_unknown", NotFoundError),
        ({"sandbox": "../" + A}, "sandbox_unknown", NotFoundError),
        ({"offset": OUTPUT_BYTES_MAX + 1}, "offset_invalid", InvalidSpecError),
        ({"offset": 2**64 - 1, "follow": True}, "offset_invalid", InvalidSpecError),
    ],
)
async def test_whose_output_is_refused(
    api: Api, fields: dict[str, Any], code: str, family: type[BedplateError]
) -> None:
    """Another tenant's sandbox is as unknown as none; what names no agent names no file."""
    api.write(b"secret")
    error = await refusal(api.read_output(**fields).read())
    assert (type(error), error.code) == (family, code)


def pack(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


TAR = pack(README=b"hello")
TAR_DIGEST = Digest("sha256:" + hashlib.sha256(TAR).hexdigest())


def header(**changes: Any) -> Any:
    fields = {"digest": TAR_DIGEST, "size_bytes": len(TAR), "tenant": ACME, **changes}
    return content_pb2.UploadSourceRequest(header=content_pb2.UploadSourceHeader(**fields))


def chunk(content: bytes) -> Any:
    return content_pb2.UploadSourceRequest(chunk=content)


async def upload(api: Api, messages: Iterable[Any]) -> Any:
    async def requests() -> AsyncIterator[Any]:
        for message in messages:
            yield message

    with translated("host"):
        return await api.content.UploadSource(requests(), timeout=CALL_S)


LYING = {
    "nothing": ([], "tenant_invalid"),
    "no header": ([chunk(TAR)], "tenant_invalid"),
    "no tenant": ([header(tenant=""), chunk(TAR)], "tenant_invalid"),
    "climbing tenant": ([header(tenant="../x"), chunk(TAR)], "tenant_invalid"),
    "no digest": ([header(digest="sha256:"), chunk(TAR)], "digest_invalid"),
    "climbing digest": ([header(digest="sha256:../" + "0" * 61), chunk(TAR)], "digest_invalid"),
    "other digest": ([header(digest=DIGEST), chunk(TAR)], "digest_mismatch"),
    "too many bytes": ([header(), chunk(TAR), chunk(b"x")], "digest_mismatch"),
    "too few bytes": ([header(), chunk(TAR[:-1])], "digest_mismatch"),
    "no bytes": ([header()], "digest_mismatch"),
    "size of nothing": ([header(size_bytes=0), chunk(TAR)], "digest_mismatch"),
    "size past all limits": ([header(size_bytes=2**64 - 1), chunk(TAR)], "source_too_large"),
    "header again": ([header(), header(), chunk(TAR[:-1])], "chunk_empty"),
}


@pytest.mark.parametrize(("messages", "code"), LYING.values(), ids=LYING.keys())
async def test_a_lying_upload_is_refused(api: Api, messages: list[Any], code: str) -> None:
    """It is the sender's error, by its code, and nothing is kept or told."""
    error = await refusal(upload(api, messages))
    assert (type(error), error.code) == (InvalidSpecError, code)
    assert (api.added, api.sources.list_sources()) == ([], [])


async def test_what_is_not_held(api: Api) -> None:
    """A source that no one sent is not held, and not found."""
    with translated("host"):
        request = content_pb2.HasSourceRequest(digest=TAR_DIGEST, tenant=ACME)
        assert not (await api.content.HasSource(request, timeout=CALL_S)).is_held
    fetch = content_pb2.FetchSourceRequest(digest=TAR_DIGEST, tenant=ACME)
    assert (await refusal(api.content.FetchSource(fetch, timeout=CALL_S).read())).code == "source_unknown"


@pytest.mark.root
async def test_a_source_goes_in_and_comes_out(api: Api) -> None:
    """Sent once, held, told to the fleet, and fetched as it was sent; for its tenant only."""
    first = await upload(api, [header(), chunk(TAR[:100]), chunk(TAR[100:])])
    again = await upload(api, [header(), chunk(TAR)])
    assert (first.digest, first.was_held, again.was_held) == (TAR_DIGEST, False, True)
    assert api.added == [(ACME, TAR_DIGEST)] * 2
    for tenant, is_held in ((ACME, True), ("other", False)):
        request = content_pb2.HasSourceRequest(digest=TAR_DIGEST, tenant=tenant)
        assert (await api.content.HasSource(request, timeout=CALL_S)).is_held is is_held
    fetch = content_pb2.FetchSourceRequest(digest=TAR_DIGEST, tenant=ACME)
    chunks = [message async for message in api.content.FetchSource(fetch, timeout=CALL_S)]
    assert b"".join(message.payload for message in chunks) == TAR
    assert (chunks[0].size_bytes, chunks[0].digest) == (len(TAR), TAR_DIGEST)


async def test_an_artifact_is_fetched(api: Api) -> None:
    """In chunks that name offset, size and digest."""
    content = TEXT * 2
    digest = Digest("sha256:" + hashlib.sha256(content).hexdigest())
    api.orders.artifact_path(A).write_bytes(content)
    api.progress(A, artifact=Artifact(digest, len(content), 1))
    request = content_pb2.FetchArtifactRequest(sandbox=A, tenant=ACME)
    chunks = [message async for message in api.content.FetchArtifact(request, timeout=CALL_S)]
    assert b"".join(message.payload for message in chunks) == content
    assert [message.offset for message in chunks] == list(range(0, len(content), CHUNK_BYTES))
    assert {(message.size_bytes, message.digest) for message in chunks} == {(len(content), digest)}


@pytest.mark.parametrize(
    ("sandbox", "tenant", "code"),
    [
        (A, "acme", "artifact_missing"),
        (A, "other", "sandbox_unknown"),
        ("c" * 12, "acme", "sandbox_unknown"),
        ("..", "acme", "sandbox_unknown"),
    ],
)
async def test_an_artifact_that_is_not_there(api: Api, sandbox: str, tenant: str, code: str) -> None:
    """Not yet, not this tenant's, not here: told apart only for its owner."""
    request = content_pb2.FetchArtifactRequest(sandbox=sandbox, tenant=tenant)
    error = await refusal(api.content.FetchArtifact(request, timeout=CALL_S).read())
    assert (type(error), error.code) == (NotFoundError, code)


async def test_an_artifact_that_was_removed_meanwhile(api: Api) -> None:
    """Between the look and the read: not found, and no crash."""
    api.progress(A, artifact=Artifact(DIGEST, 1, 0))
    request = content_pb2.FetchArtifactRequest(sandbox=A, tenant=ACME)
    error = await refusal(api.content.FetchArtifact(request, timeout=CALL_S).read())
    assert error.code == "sandbox_unknown"
