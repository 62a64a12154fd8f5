"""Bytes through the scheduler: sources in, output and artifacts out, at the client's pace and within its tenant."""

import asyncio
import hashlib
import io
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bedplate.content.v1 import content_pb2
from bedplate.sandbox.v1 import sandbox_pb2, service_pb2
from fleet.codec import to_message
from fleet.errors import BedplateError, InvalidSpecError, NotFoundError, UnavailableError
from fleet.identity import Role
from fleet.model.host import Reservation
from fleet.model.ids import Digest, HostId
from fleet.model.sandbox import Source
from fleet.rpc import CHUNK_BYTES, error_from_call
from fleet.store.keyspace import source_hosts
from fleet.store.memory import MemoryStore
from fleet.store.port import Store
from scheduler.api.content import DOWNLOADS_MAX, UPLOADS_MAX, choose_holder
from tests.integration.scheduler.parts import HANG_S, Client, Fleet, ObedientHost
from tests.unit.scheduler.build import DEMO, ROOMY, SOURCE, host, sandbox_id, snapshot, spec

ID = sandbox_id(0)


def pack(size_bytes: int) -> bytes:
    """A clean tar with one file."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("file")
        member.size, member.mode = size_bytes, 0o644
        archive.addfile(member, io.BytesIO(b"x" * size_bytes))
    return packed.getvalue()


def digest_of(content: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(content).hexdigest())


def upload(content: bytes, *, digest: str = "", size_bytes: int = -1, tenant: str = "") -> Iterator[Any]:
    """The messages of an upload; digest and size are the true ones unless given."""
    header = content_pb2.UploadSourceHeader(
        digest=digest or digest_of(content),
        size_bytes=len(content) if size_bytes < 0 else size_bytes,
        tenant=tenant,
    )
    yield content_pb2.UploadSourceRequest(header=header)
    for start in range(0, len(content), CHUNK_BYTES):
        yield content_pb2.UploadSourceRequest(chunk=content[start : start + CHUNK_BYTES])


async def refusal_of(call: Any) -> BedplateError:
    """The error that a call, or the reading of a stream, must end with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (collect(call) if hasattr(call, "__aiter__") else call)
    return error_from_call(caught.value, "scheduler")


async def collect(stream: Any) -> bytes:
    """The payload of a stream, whose offsets must join."""
    content = b""
    async with asyncio.timeout(HANG_S):
        async for chunk in stream:
            assert chunk.offset == len(content)
            content += chunk.payload
    return content


async def run_one(demo: Client, local: ObedientHost) -> None:
    """Creates a sandbox and waits until its host has taken it and the scheduler knows."""
    await demo.sandboxes.CreateSandbox(service_pb2.CreateSandboxRequest(sandbox_id=ID, spec=to_message(spec())))
    await local.ordered(ID)
    async with asyncio.timeout(HANG_S):
        watch = demo.sandboxes.WatchSandbox(service_pb2.GetSandboxRequest(sandbox=ID))
        async for seen in watch:
            if seen.HasField("status"):
                break
        watch.cancel()


@pytest.fixture
async def demo(fleet: Fleet, local: ObedientHost) -> Client:
    """The tenant `demo`, once the scheduler answers and knows the host."""
    await fleet.knows(local.host_id)
    return fleet.client(Role.TENANT, "demo")


async def test_a_source_is_sent_once_and_can_be_named(demo: Client, local: ObedientHost, store: Store) -> None:
    """After an upload the source is held, comes back bit for bit, and a sandbox may name it at once; a second upload is none."""
    content = pack(3 * CHUNK_BYTES)
    digest = digest_of(content)
    has = content_pb2.HasSourceRequest(digest=digest)
    assert not (await demo.content.HasSource(has)).is_held
    answer = await demo.content.UploadSource(upload(content))
    assert (answer.digest, answer.was_held) == (digest, False)
    assert (await demo.content.HasSource(has)).is_held
    assert (await demo.content.UploadSource(upload(content))).was_held
    fetched = demo.content.FetchSource(content_pb2.FetchSourceRequest(digest=digest))
    assert await collect(fetched) == content
    wanted = spec(sources=(Source(digest, len(content), "/workspace"),))
    request = service_pb2.CreateSandboxRequest(sandbox_id=ID, spec=to_message(wanted))
    assert (await demo.sandboxes.CreateSandbox(request)).sandbox_id == ID


async def test_sources_stay_within_their_tenant(demo: Client, fleet: Fleet) -> None:
    """Another tenant neither sees nor fetches a source, cannot write into a tenant that is not its own, and an operator can."""
    content = pack(100)
    await demo.content.UploadSource(upload(content))
    other, operator = fleet.client(Role.TENANT, "other"), fleet.client(Role.OPERATOR, "operator")
    digest = digest_of(content)
    assert not (await other.content.HasSource(content_pb2.HasSourceRequest(digest=digest))).is_held
    error = await refusal_of(other.content.FetchSource(content_pb2.FetchSourceRequest(digest=digest)))
    assert (type(error), error.code) == (NotFoundError, "source_unknown")
    assert (await refusal_of(other.content.UploadSource(upload(content, tenant="demo")))).code == "tenant_not_permitted"
    named = content_pb2.FetchSourceRequest(digest=digest, tenant="demo")
    assert await collect(operator.content.FetchSource(named)) == content


BAD_UPLOADS = [
    ("header_missing", []),
    ("header_missing", [content_pb2.UploadSourceRequest(chunk=b"x")]),
    ("digest_invalid", list(upload(b"x", digest="sha1:0"))),
    ("source_too_large", list(upload(b"x", size_bytes=0))),
    ("source_too_large", list(upload(b"x", size_bytes=2**40))),
    ("chunk_invalid", list(upload(b"x" * 100, size_bytes=50))),
    ("digest_mismatch", list(upload(b"x" * 100, size_bytes=200))),
    ("digest_mismatch", list(upload(b"x" * 100, digest=SOURCE))),
    (
        "chunk_invalid",
        [
            *upload(b"", digest=SOURCE, size_bytes=2**20),
            content_pb2.UploadSourceRequest(chunk=b"x" * (CHUNK_BYTES + 1)),
        ],
    ),
]


@pytest.mark.parametrize(("code", "messages"), BAD_UPLOADS, ids=[f"{n}-{c[0]}" for n, c in enumerate(BAD_UPLOADS)])
async def test_a_bad_upload_leaves_nothing(demo: Client, store: Store, code: str, messages: list[Any]) -> None:
    """An upload that is not what its header says is refused with its reason, and no host registers it."""
    error = await refusal_of(demo.content.UploadSource(messages))
    assert isinstance(error, InvalidSpecError)
    assert error.code == code
    assert error.next_step
    assert (await store.list_prefix(source_hosts(DEMO, ""))).entries == ()


async def test_an_upload_that_is_broken_off_ends_at_the_host(demo: Client, local: ObedientHost) -> None:
    """A client that goes away in mid-upload takes its upload at the host with it: nothing half is left."""
    content = pack(4 * CHUNK_BYTES)
    incoming = asyncio.Event()

    async def messages() -> AsyncIterator[Any]:
        for message in list(upload(content))[:2]:
            yield message
        incoming.set()
        await asyncio.Event().wait()

    call = demo.content.UploadSource(messages())
    async with asyncio.timeout(HANG_S):
        await incoming.wait()
        folder = local.sources_dir
        while not list(folder.glob(".incoming-*/source.tar")):  # noqa: ASYNC110 (a file's appearance is no event)
            await asyncio.sleep(0.01)
        call.cancel()
        while list(folder.glob(".incoming-*")):  # noqa: ASYNC110 (nor is its going)
            await asyncio.sleep(0.01)


async def test_output_is_followed_from_before_the_start(demo: Client, local: ObedientHost) -> None:
    """A follow that begins while the sandbox is pending gets every byte once, in order, and ends when nothing can follow."""
    create = service_pb2.CreateSandboxRequest(sandbox_id=ID, spec=to_message(spec()))
    await demo.sandboxes.CreateSandbox(create)
    follow = demo.output.ReadOutput(service_pb2.ReadOutputRequest(sandbox="box-0", follow=True))
    reader = asyncio.create_task(collect(follow))
    await local.ordered(ID)
    await local.start(ID)
    expected = b""
    for number in range(20):
        line = f"line {number}\n".encode()
        await local.print(ID, line)
        expected += line
    await local.finish(ID, b"artifact", digest_of(b"artifact"))
    assert await reader == expected


async def test_output_is_read_from_any_offset(demo: Client, local: ObedientHost) -> None:
    """Without follow a read ends at what there is, and says whether more may come."""
    await run_one(demo, local)
    await local.start(ID)
    content = bytes(range(256)) * 3000
    await local.print(ID, content)
    wanted = service_pb2.ReadOutputRequest(sandbox=ID, agent="worker", offset=1000)
    async with asyncio.timeout(HANG_S):
        chunks = [chunk async for chunk in demo.output.ReadOutput(wanted)]
    assert b"".join(chunk.payload for chunk in chunks) == content[1000:]
    assert (chunks[0].offset, chunks[-1].end) == (1000, False)
    await local.finish(ID, b"", digest_of(b""))
    chunks = [chunk async for chunk in demo.output.ReadOutput(wanted)]
    assert chunks[-1].end


async def test_output_of_what_has_not_started_is_empty(demo: Client, fleet: Fleet) -> None:
    """Without follow there is an empty answer that is not the end; stopped before it had a host, it is the end."""
    create = service_pb2.CreateSandboxRequest(sandbox_id=ID, spec=to_message(spec()))
    create.spec.require_labels.add(name="nowhere", value="x")
    await demo.sandboxes.CreateSandbox(create)
    wanted = service_pb2.ReadOutputRequest(sandbox=ID, offset=7)
    (chunk,) = [chunk async for chunk in demo.output.ReadOutput(wanted)]
    assert (chunk.offset, chunk.payload, chunk.end) == (7, b"", False)
    follow = demo.output.ReadOutput(service_pb2.ReadOutputRequest(sandbox=ID, follow=True))
    reader = asyncio.create_task(collect(follow))
    await demo.sandboxes.StopSandbox(service_pb2.GetSandboxRequest(sandbox=ID))
    assert await reader == b""


@pytest.mark.parametrize("change", ["restart", "move"])
async def test_a_follow_outlives_a_change_of_address(
    fleet: Fleet, demo: Client, local: ObedientHost, change: str
) -> None:
    """When hostd comes back at another address, a follow goes on where it was: nothing is lost or doubled."""
    await run_one(demo, local)
    await local.start(ID)
    follow = demo.output.ReadOutput(service_pb2.ReadOutputRequest(sandbox=ID, follow=True))
    await local.print(ID, b"before ")
    async with asyncio.timeout(HANG_S):
        first = await anext(aiter(follow))
    assert first.payload == b"before "
    await (local.restart() if change == "restart" else local.move())
    # Another call makes the scheduler give the old address up, once it has heard of the new one.
    await fleet.knows(local.host_id, local.address)
    assert await collect(demo.output.ReadOutput(service_pb2.ReadOutputRequest(sandbox=ID))) == b"before "
    await local.print(ID, b"after")
    await local.finish(ID, b"", digest_of(b""))
    rest = b""
    async with asyncio.timeout(HANG_S):
        async for chunk in follow:
            assert chunk.offset == 7 + len(rest)
            rest += chunk.payload
    assert rest == b"after"


async def test_an_unknown_agent_is_told(demo: Client, local: ObedientHost) -> None:
    """The answer lists the agents there are."""
    await run_one(demo, local)
    error = await refusal_of(demo.output.ReadOutput(service_pb2.ReadOutputRequest(sandbox=ID, agent="nobody")))
    assert (type(error), error.code) == (InvalidSpecError, "agent_unknown")
    assert "worker" in error.message


async def test_a_follower_that_goes_away_frees_the_host(demo: Client, local: ObedientHost) -> None:
    """When the client of a follow is gone, the call to the host is cancelled as well."""
    await run_one(demo, local)
    await local.start(ID)
    await local.print(ID, b"x")
    follow = demo.output.ReadOutput(service_pb2.ReadOutputRequest(sandbox=ID, follow=True))
    async with asyncio.timeout(HANG_S):
        await follow.read()
        assert local.output_calls == 1
        follow.cancel()
        while local.output_calls:  # noqa: ASYNC110 (the end of a call at the far side is no event here)
            await asyncio.sleep(0.01)


async def test_one_caller_has_so_many_uploads(demo: Client) -> None:
    """An upload beyond a caller's limit is refused with what to do; when one ends there is room again."""
    gate = asyncio.Event()

    async def waiting() -> AsyncIterator[Any]:
        await gate.wait()
        for message in upload(pack(10)):
            yield message

    calls = [demo.content.UploadSource(waiting()) for _ in range(UPLOADS_MAX)]
    for call in calls:
        await call.wait_for_connection()
    error = await refusal_of(demo.content.UploadSource(upload(pack(10))))
    assert (type(error), error.code) == (UnavailableError, "calls_exhausted")
    gate.set()
    assert {answer.digest for answer in await asyncio.gather(*calls)} == {digest_of(pack(10))}
    assert (await demo.content.UploadSource(upload(pack(10)))).was_held


async def test_one_caller_has_so_many_downloads(demo: Client) -> None:
    """Whoever opens downloads and reads none of them holds so many streams and no more."""
    # More than is under way in all buffers between a host and a client that does not read.
    content = pack(96 * CHUNK_BYTES)
    await demo.content.UploadSource(upload(content))
    wanted = content_pb2.FetchSourceRequest(digest=digest_of(content))
    calls = [demo.content.FetchSource(wanted) for _ in range(DOWNLOADS_MAX)]
    for call in calls:
        await call.read()
    error = await refusal_of(demo.content.FetchSource(wanted))
    assert (type(error), error.code) == (UnavailableError, "calls_exhausted")
    for call in calls:
        call.cancel()


async def test_an_artifact_comes_back(demo: Client, local: ObedientHost) -> None:
    """The artifact's bytes and digest arrive as stored; before there is one, the answer says what to wait for."""
    await run_one(demo, local)
    wanted = content_pb2.FetchArtifactRequest(sandbox="box-0")
    error = await refusal_of(demo.content.FetchArtifact(wanted))
    assert (type(error), error.code) == (NotFoundError, "artifact_missing")
    artifact = b"changes" * 100_000
    await local.finish(ID, artifact, digest_of(artifact))
    stream = demo.content.FetchArtifact(wanted)
    first = await anext(aiter(stream))
    assert (first.size_bytes, first.digest) == (len(artifact), digest_of(artifact))
    assert first.payload + b"".join([chunk.payload async for chunk in stream]) == artifact
    shown = await demo.sandboxes.GetSandbox(service_pb2.GetSandboxRequest(sandbox=ID))
    assert shown.phase == sandbox_pb2.PHASE_COMPLETED


async def test_a_host_that_is_not_who_it_says_gets_nothing(memory: MemoryStore, pki: Path, tmp_path: Path) -> None:
    """A host's address that leads to a server with another certificate is not spoken to."""
    async with (
        Fleet(memory, pki).running() as fleet,
        ObedientHost(memory, pki, tmp_path / "imposter").running(as_host=HostId("victim")),
    ):
        client = fleet.client(Role.TENANT, "demo")
        await fleet.knows(HostId("victim"))
        error = await refusal_of(client.content.UploadSource(upload(pack(10))))
        assert (type(error), error.code) == (UnavailableError, "unreachable")


def test_the_roomiest_live_host_takes_a_source() -> None:
    """A holder first; then free memory decides, not capacity; then the id; without a live host the answer says so."""
    big, small, dead = (host(name) for name in ("big", "small", "dead"))
    taken = {big.host_id: Reservation(big.host_id, memory_mib=ROOMY.memory_mib)}
    alive = frozenset([big.host_id, small.host_id])
    seen = snapshot(hosts=[big, small, dead], alive=alive)
    assert choose_holder(seen, DEMO, SOURCE) == "big"
    assert choose_holder(snapshot(hosts=[big, small, dead], alive=alive, reservations=taken), DEMO, SOURCE) == "small"
    held = {(DEMO, SOURCE): frozenset([dead.host_id, small.host_id])}
    assert choose_holder(snapshot(hosts=[big, small, dead], alive=alive, sources=held), DEMO, SOURCE) == "small"
    with pytest.raises(UnavailableError, match="no host is alive"):
        choose_holder(snapshot(hosts=[dead], alive=frozenset()), DEMO, SOURCE)


async def test_where_to_begin_counts_once(demo: Client, local: ObedientHost) -> None:
    """Since and tail reach the host as they were asked; once something came, a host that has restarted is read on by offset."""
    await run_one(demo, local)
    await local.start(ID)
    await local.print(ID, b"one\ntwo\nthree\n")
    wanted = service_pb2.ReadOutputRequest(sandbox=ID, follow=True, since_ms=5, tail_lines=2)
    follow = demo.output.ReadOutput(wanted)
    async with asyncio.timeout(HANG_S):
        first = await follow.read()
        while not first.payload:
            first = await follow.read()
        await local.restart()
        await fleet_moved(local, 2)
        await local.print(ID, b"four\n")
        rest = await follow.read()
        while not rest.payload:
            rest = await follow.read()
    asked = [(one.offset, one.since_ms, one.tail_lines) for one in local.output_requests]
    assert asked[0] == (0, 5, 2)
    assert asked[-1] == (first.offset + len(first.payload), 0, 0)
    assert (rest.offset, rest.payload) == (first.offset + len(first.payload), b"four\n")
    follow.cancel()


async def fleet_moved(local: ObedientHost, calls: int) -> None:
    """Returns when the host has been asked for output so many times."""
    while len(local.output_requests) < calls:  # noqa: ASYNC110 (a call at the far side is no event here)
        await asyncio.sleep(0.02)
