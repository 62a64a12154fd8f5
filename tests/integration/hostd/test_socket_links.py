"""The real links on real unix sockets, with a guest at the other end that may do anything."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from fleet.errors import UnavailableError
from fleet.model.ids import SandboxId
from hostd.drivers.guest import Pace, SocketLinks
from hostd.drivers.guest.frames import MAGIC, MARKER_BYTES, NONCE_BYTES, encode_frame
from hostd.drivers.guest.link import BREAKS_MAX
from hostd.drivers.ports import LinkMessage

A = SandboxId("aaaaaaaaaaaa")
# Short where a test waits for it to pass, and never long enough to matter.
PACE = Pace(marker_s=0.05, connect_s=0.01, send_s=0.3)
# A test that waits for what never comes ends here.
pytestmark = pytest.mark.timeout(60)
HELLO = LinkMessage("hello", {"version": 2})


class Peer:
    """QEMU's end of a guest link: each connection waits until the test takes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connections: asyncio.Queue[Connection] = asyncio.Queue()
        self._served: list[Connection] = []
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._take, self.path)

    async def close(self) -> None:
        for connection in self._served:
            connection.hang_up()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        self.path.unlink(missing_ok=True)

    async def accept(self) -> "Connection":
        return await self._connections.get()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        self._served.append(connection)
        self._connections.put_nowait(connection)


class Connection:
    """One session as the guest sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read_marker(self) -> bytes:
        marker = await self._reader.readexactly(MARKER_BYTES)
        assert marker.startswith(MAGIC)
        return marker

    async def answer(self, *messages: LinkMessage) -> None:
        self.write(await self.read_marker() + b"".join(map(encode_frame, messages)))

    def write(self, content: bytes) -> None:
        self._writer.write(content)

    async def read_type(self) -> str:
        header_bytes = int.from_bytes(await self._reader.readexactly(4), "big")
        payload_bytes = int.from_bytes(await self._reader.readexactly(4), "big")
        header = json.loads(await self._reader.readexactly(header_bytes))
        await self._reader.readexactly(payload_bytes)
        return str(header["type"])

    async def read_end(self) -> None:
        while await self._reader.read(65536):
            pass

    def hang_up(self) -> None:
        self._writer.transport.abort()


class Host:
    """hostd's end: what was received, in order."""

    def __init__(self, pace: Pace) -> None:
        self.links = SocketLinks(pace=pace)
        self._received: asyncio.Queue[LinkMessage] = asyncio.Queue()

    async def receive(self, _sandbox_id: SandboxId, message: LinkMessage) -> None:
        self._received.put_nowait(message)

    async def next(self) -> LinkMessage:
        return await self._received.get()

    async def expect(self, *types: str) -> None:
        for type_ in types:
            assert (await self.next()).type == type_

    def is_silent(self) -> bool:
        return self._received.empty()


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    """A socket where QEMU would listen."""
    peer = Peer(tmp_path / "a.link")
    await peer.open()
    yield peer
    await peer.close()


@pytest.fixture
async def host(peer: Peer) -> AsyncIterator[Host]:
    """hostd's end, attached; the whole test ends with it."""
    host = Host(PACE)
    host.links.attach(A, str(peer.path), host.receive)
    yield host
    await host.links.close()


async def test_a_session_begins(peer: Peer, host: Host) -> None:
    """Marker, its answer, hello; then both sides are heard."""
    guest = await peer.accept()
    await guest.answer(HELLO)
    await host.expect("connected", "hello")
    await host.links.send(A, LinkMessage("resume"))
    assert await guest.read_type() == "resume"


async def test_the_marker_is_repeated_with_a_fresh_nonce(peer: Peer, host: Host) -> None:
    """A guest that answers late, or an older marker, is still found by its answer to the latest."""
    guest = await peer.accept()
    first = await guest.read_marker()
    second = await guest.read_marker()
    assert first != second
    guest.write(first + encode_frame(LinkMessage("stale")))

    async def answer_each() -> None:
        # Only the answer to the marker sent last is one; it may take some tries to be in time.
        while True:
            await guest.answer(HELLO)

    answering = asyncio.create_task(answer_each())
    await host.expect("connected")
    assert (await host.next()) == HELLO
    answering.cancel()
    await asyncio.wait([answering])


async def test_stale_bytes_are_no_message(peer: Peer, host: Host) -> None:
    """What lay in QEMU's buffers from before is dropped, frames and markers of others included."""
    guest = await peer.accept()
    guest.write(encode_frame(LinkMessage("stale")) + MAGIC + bytes(NONCE_BYTES) + encode_frame(LinkMessage("stale")))
    await guest.answer(HELLO)
    await host.expect("connected", "hello")


async def test_a_new_session_follows_every_hang_up(peer: Peer, host: Host) -> None:
    """Half a frame is lost with its session, and the next begins with connected and hello; hanging up is no offence."""
    for _ in range(BREAKS_MAX + 2):
        guest = await peer.accept()
        await guest.answer(HELLO)
        guest.write(encode_frame(LinkMessage("agent"))[:-1])
        await host.expect("connected", "hello")
        guest.hang_up()
        await host.expect("disconnected")


async def test_a_socket_that_comes_late_is_found(tmp_path: Path) -> None:
    """QEMU makes the socket after its start: until then it is looked for."""
    late, host = Peer(tmp_path / "late.link"), Host(PACE)
    host.links.attach(A, str(late.path), host.receive)
    with pytest.raises(UnavailableError):
        await host.links.send(A, LinkMessage("stop"))
    await late.open()
    await (await late.accept()).answer(HELLO)
    await host.expect("connected", "hello")
    await host.links.close()
    await late.close()


async def test_a_guest_that_breaks_the_protocol_is_given_up(peer: Peer, host: Host) -> None:
    """Each break ends the session; the fifth within a minute is reported once, and nobody connects any more."""
    for _ in range(BREAKS_MAX):
        guest = await peer.accept()
        await guest.answer(HELLO)
        guest.write(bytes(8))
        await host.expect("connected", "hello", "disconnected")
    broken = await host.next()
    assert (broken.type, broken.fields["code"]) == ("broken", "guest_link_broken")
    with pytest.raises(UnavailableError):
        await host.links.send(A, LinkMessage("stop"))
    assert host.is_silent()


async def test_nothing_is_sent_before_the_answer(peer: Peer, host: Host) -> None:
    """A connected socket is no session: the guest has not spoken."""
    guest = await peer.accept()
    await guest.read_marker()
    with pytest.raises(UnavailableError) as caught:
        await host.links.send(A, LinkMessage("stop"))
    assert caught.value.code == "link_down"


async def flood(host: Host) -> None:
    while True:
        await host.links.send(A, LinkMessage("configure", {}, bytes(128 * 1024)))


async def test_a_guest_that_does_not_read_is_cut_off(peer: Peer, host: Host) -> None:
    """With every buffer full a send ends in its time, and the session with it; the next one begins anew."""
    guest = await peer.accept()
    await guest.answer(HELLO)
    await host.expect("connected", "hello")
    with pytest.raises(UnavailableError) as caught:
        await flood(host)
    assert caught.value.code == "link_down"
    again = await peer.accept()
    await again.answer(HELLO)
    await host.expect("disconnected", "connected", "hello")


async def test_the_next_message_waits_for_the_receiver(peer: Peer, tmp_path: Path) -> None:
    """A slow receiver slows its guest: one message at a time, in order."""
    links, seen, go = SocketLinks(pace=PACE), asyncio.Queue[str](), asyncio.Semaphore(0)

    async def receive(_sandbox_id: SandboxId, message: LinkMessage) -> None:
        seen.put_nowait(message.type)
        await go.acquire()

    links.attach(A, str(peer.path), receive)
    await (await peer.accept()).answer(HELLO, LinkMessage("one"), LinkMessage("two"))
    for type_ in ("connected", "hello", "one", "two"):
        assert await seen.get() == type_
        assert seen.empty()
        go.release()
    await links.close()


async def test_detach_ends_the_session(peer: Peer, host: Host) -> None:
    """The socket is free for the next hostd, nothing is received any more, and detaching twice is nothing."""
    guest = await peer.accept()
    await guest.answer(HELLO)
    await host.expect("connected", "hello")
    await host.links.detach(A)
    await host.links.detach(A)
    await guest.read_end()
    assert host.is_silent()


async def test_attaching_twice_is_one_session(peer: Peer, host: Host) -> None:
    """The second attach changes nothing."""
    host.links.attach(A, str(peer.path), host.receive)
    await (await peer.accept()).answer(HELLO)
    await host.expect("connected", "hello")
    assert host.is_silent()


async def test_a_detach_from_within_is_possible(peer: Peer) -> None:
    """A receiver may end the link whose message it takes."""
    links, detached = SocketLinks(pace=PACE), asyncio.Event()

    async def receive(sandbox_id: SandboxId, _message: LinkMessage) -> None:
        await links.detach(sandbox_id)
        detached.set()

    receiver: Callable[[SandboxId, LinkMessage], Awaitable[None]] = receive
    links.attach(A, str(peer.path), receiver)
    await (await peer.accept()).answer(HELLO)
    await detached.wait()
    with pytest.raises(UnavailableError):
        await links.send(A, LinkMessage("stop"))
    await links.close()
