"""Keeps one session up on each guest's unix socket: connect, marker, frames, and again after every break.

Knows nothing of what messages mean. A guest that breaks the protocol BREAKS_MAX times in BREAKS_WINDOW_S is reported once, as
`broken`, and left alone.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

import structlog

from fleet.errors import UnavailableError
from fleet.model.ids import SandboxId
from hostd.allowance import Allowance
from hostd.drivers.guest.frames import NONCE_BYTES, FrameError, FrameReader, encode_for_guest
from hostd.drivers.ports import LinkMessage, LinkReceiver

READ_BYTES = 64 * 1024
BREAKS_MAX = 5
BREAKS_WINDOW_S = 60.0
# What one guest may cost hostd's only thread. A frame is one unit (30 to 100 us here), and so are each KiB of JSON and each 64 KiB
# of payload: 2,000 carry 100 MB/s of artifact, or noise that takes a tenth of a core. Whoever sends more waits.
UNITS_PER_S, UNITS_BURST = 2_000.0, 1_000.0
HEADER_UNIT_BYTES, PAYLOAD_UNIT_BYTES = 1024, 64 * 1024
# After so long others have their turn, however much one guest has sent.
TURN_S = 0.002

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a link waits, in seconds.

    `marker_s` for the answer to a marker before the next is sent: early in a boot nobody reads the port yet. `connect_s` before it
    connects again: QEMU makes the socket a moment after its start and serves one client at a time. `send_s` for a guest that
    takes no byte, with QEMU's buffers full: it is not reading.
    """

    marker_s: float = 2.0
    connect_s: float = 0.2
    send_s: float = 30.0


DEFAULT_PACE = Pace()


@dataclass(slots=True)
class _Link:
    """One guest's link and the task that keeps it."""

    sandbox_id: SandboxId
    path: str
    receive: LinkReceiver
    writer: asyncio.StreamWriter | None = None
    is_framed: bool = False
    breaks: deque[float] = field(default_factory=lambda: deque(maxlen=BREAKS_MAX))
    allowance: Allowance = field(default_factory=lambda: Allowance(UNITS_PER_S, UNITS_BURST, time.monotonic))
    runner: asyncio.Task[None] | None = None


class SocketLinks:
    """The links of this host, over the sockets that QEMU serves."""

    def __init__(self, make_nonce: Callable[[int], bytes] = secrets.token_bytes, pace: Pace = DEFAULT_PACE) -> None:
        self._make_nonce = make_nonce
        self._pace = pace
        self._links: dict[SandboxId, _Link] = {}

    def attach(self, sandbox_id: SandboxId, link_path: str, receive: LinkReceiver) -> None:
        """Keep a session up until detach."""
        if sandbox_id not in self._links:
            link = _Link(sandbox_id, link_path, receive)
            self._links[sandbox_id] = link
            link.runner = asyncio.create_task(self._run(link), name=f"link-{sandbox_id}")

    async def send(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        """Send one message; raises UnavailableError `link_down` when no session stands or the guest takes nothing."""
        link = self._links.get(sandbox_id)
        # Held here: the session may end while this waits, and takes the link's own away.
        writer = link.writer if link is not None and link.is_framed else None
        if writer is None:
            raise UnavailableError("link_down", f"the guest link of {sandbox_id} is down", "it is retried")
        try:
            writer.write(encode_for_guest(message))
            # Most sends leave nothing behind, and wait for nothing.
            if writer.transport.get_write_buffer_size() or writer.is_closing():
                async with asyncio.timeout(self._pace.send_s):
                    await writer.drain()
        except (OSError, TimeoutError) as error:
            writer.transport.abort()
            raise UnavailableError("link_down", f"the guest of {sandbox_id} takes nothing", "it is retried") from error

    async def detach(self, sandbox_id: SandboxId) -> None:
        """End the session and forget the link."""
        link = self._links.pop(sandbox_id, None)
        if link is not None and link.runner is not None and link.runner is not asyncio.current_task():
            link.runner.cancel()
            await asyncio.wait([link.runner])

    async def close(self) -> None:
        """Detach from every guest."""
        for sandbox_id in tuple(self._links):
            await self.detach(sandbox_id)

    async def _run(self, link: _Link) -> None:
        while self._is_attached(link):
            try:
                await self._hold_session(link)
            except FrameError as error:
                log.warning("link.broken", sandbox_id=link.sandbox_id, error=str(error))
                if self._has_broken_too_often(link):
                    await link.receive(link.sandbox_id, _broken(str(error)))
                    return
            except OSError:
                pass
            await asyncio.sleep(self._pace.connect_s)

    async def _hold_session(self, link: _Link) -> None:
        reader, writer = await asyncio.open_unix_connection(link.path)
        link.writer = writer
        try:
            await self._converse(link, reader, writer)
        finally:
            had_session, link.writer, link.is_framed = link.is_framed, None, False
            writer.transport.abort()
            if had_session and self._is_attached(link):
                await link.receive(link.sandbox_id, LinkMessage("disconnected"))
            with suppress(OSError):
                await writer.wait_closed()

    async def _converse(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader()
        marker_at = 0.0
        while self._is_attached(link):
            if not frames.is_framed and time.monotonic() >= marker_at:
                writer.write(frames.expect(self._make_nonce(NONCE_BYTES)))
                marker_at = time.monotonic() + self._pace.marker_s
            try:
                async with asyncio.timeout(None if frames.is_framed else max(0.0, marker_at - time.monotonic())):
                    content = await reader.read(READ_BYTES)
            except TimeoutError:
                continue
            if not content:
                return
            await self._deliver(link, frames, content)
            # Noise that is no frame has its price, too.
            await _pace(link.allowance.spend(1 + len(content) / PAYLOAD_UNIT_BYTES))

    async def _deliver(self, link: _Link, frames: FrameReader, content: bytes) -> None:
        messages = frames.feed(content)
        first = next(messages, None)
        if frames.is_framed and not link.is_framed:
            link.is_framed = True
            await link.receive(link.sandbox_id, LinkMessage("connected"))
        turn_ends_at = time.monotonic() + TURN_S
        for message in () if first is None else chain([first], messages):
            if not self._is_attached(link):
                return
            await link.receive(link.sandbox_id, message)
            wait_s = link.allowance.spend(
                1 + frames.header_bytes / HEADER_UNIT_BYTES + frames.payload_bytes / PAYLOAD_UNIT_BYTES
            )
            if wait_s or time.monotonic() > turn_ends_at:
                await asyncio.sleep(wait_s)
                turn_ends_at = time.monotonic() + TURN_S

    def _is_attached(self, link: _Link) -> bool:
        # A receiver may detach the link whose message it takes: its runner then ends by itself.
        return self._links.get(link.sandbox_id) is link

    def _has_broken_too_often(self, link: _Link) -> bool:
        link.breaks.append(time.monotonic())
        return len(link.breaks) == BREAKS_MAX and link.breaks[-1] - link.breaks[0] < BREAKS_WINDOW_S


async def _pace(wait_s: float) -> None:
    if wait_s:
        await asyncio.sleep(wait_s)


def _broken(message: str) -> LinkMessage:
    return LinkMessage("broken", {"code": "guest_link_broken", "message": message})
