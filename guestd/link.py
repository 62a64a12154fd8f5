"""The guest's side of docs/guest-link.md as bytes: markers and frames in, frames out, within limits. PURE.

hunting -- MAGIC + nonce --> framed -- a fault --> hunting; MAGIC wherever it stands begins a new session
"""

from __future__ import annotations

import json
import struct
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

MAGIC = b"\x00BEDPLATE-LINK\x01\n"
NONCE_BYTES = 16
MARKER_BYTES = len(MAGIC) + NONCE_BYTES
HEADER_BYTES_MAX = 16 * 1024
PAYLOAD_BYTES_MAX = 256 * 1024
# No frame, after any part of one: a host that is in a session meets a length of 0 and begins anew, one that hunts ignores it.
RESYNC_BYTES = 8 + HEADER_BYTES_MAX + PAYLOAD_BYTES_MAX
# Nothing more is asked of the streams while this much waits: two full frames keep the port busy.
OUTBOX_BYTES = 2 * PAYLOAD_BYTES_MAX
# The port's driver takes this much at once; small frames are put together up to it.
WRITE_BYTES = 32 * 1024

_LENGTHS = struct.Struct(">II")


class FrameError(Exception):
    """The host broke the protocol; str() says how."""


class Message:
    """One frame: a type, the header's other fields, the payload."""

    __slots__ = ("fields", "payload", "type")

    def __init__(self, type_: str, fields: Mapping[str, Any], payload: bytes = b"") -> None:
        self.type = type_
        self.fields = fields
        self.payload = payload


def encode_frame(type_: str, fields: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """The frame of a message that is within the limits."""
    header = json.dumps({**fields, "type": type_}, separators=(",", ":")).encode()
    assert len(header) <= HEADER_BYTES_MAX
    assert len(payload) <= PAYLOAD_BYTES_MAX
    return _LENGTHS.pack(len(header), len(payload)) + header + payload


class FrameReader:
    """Takes bytes as they come; holds at most one frame and what was fed last.

    All the host sends is JSON, in which the control characters of MAGIC cannot stand: MAGIC is a marker wherever it is found. So a
    hang-up that nobody noticed, in the middle of a frame, costs nothing.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._is_framed = False

    def reset(self) -> None:
        """Forget everything and hunt."""
        self._buffer.clear()
        self._is_framed = False

    def feed(self, content: bytes) -> tuple[bytes | None, list[Message]]:
        """The nonce of the latest marker in `content` if there is one, and the complete messages after it.

        Raises FrameError when the host broke the protocol, and hunts again.
        """
        self._buffer += content
        nonce = self._find_marker()
        messages: list[Message] = []
        try:
            while self._is_framed and (message := self._take()) is not None:
                messages.append(message)
        except FrameError:
            self.reset()
            raise
        return nonce, messages

    def _find_marker(self) -> bytes | None:
        found = self._buffer.rfind(MAGIC)
        if found >= 0:
            del self._buffer[:found]
            # Until the nonce is complete nothing is a frame.
            self._is_framed = len(self._buffer) >= MARKER_BYTES
            if not self._is_framed:
                return None
            nonce = bytes(self._buffer[len(MAGIC) : MARKER_BYTES])
            del self._buffer[:MARKER_BYTES]
            return nonce
        if not self._is_framed:
            del self._buffer[: max(0, len(self._buffer) - len(MAGIC) + 1)]
        return None

    def _take(self) -> Message | None:
        if len(self._buffer) < _LENGTHS.size or MAGIC.startswith(self._buffer[: len(MAGIC)]):
            return None
        header_bytes, payload_bytes = _LENGTHS.unpack_from(self._buffer)
        if not 2 <= header_bytes <= HEADER_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
            raise FrameError(f"a frame of {header_bytes} + {payload_bytes} bytes is past the limits")
        end = _LENGTHS.size + header_bytes + payload_bytes
        if len(self._buffer) < end:
            return None
        header = bytes(self._buffer[_LENGTHS.size : _LENGTHS.size + header_bytes])
        payload = bytes(self._buffer[_LENGTHS.size + header_bytes : end])
        del self._buffer[:end]
        return _decode(header, payload)


class Outbox:
    """Frames on their way to the host, in two lanes that take turns; what a new session or a hang-up makes stale is dropped.

    The urgent lane is what a person waits for: it never queues behind more than one frame of bulk, and never starves it.
    """

    def __init__(self) -> None:
        # Being written: the tail of one frame, or a few small ones.
        self._buffer = bytearray()
        self._bulk: deque[bytes] = deque()
        self._urgent: deque[bytes] = deque()
        self._bulk_bytes = self._urgent_bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether a stream may add its next chunk."""
        return self._bulk_bytes < OUTBOX_BYTES

    @property
    def has_urgent_room(self) -> bool:
        """Whether a program may add its next chunk."""
        return self._urgent_bytes < OUTBOX_BYTES

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._buffer and not self._bulk and not self._urgent

    def clear(self) -> None:
        """Drop what waits."""
        for waiting in (self._buffer, self._bulk, self._urgent):
            waiting.clear()
        self._bulk_bytes = self._urgent_bytes = 0

    def restart(self, nonce: bytes) -> None:
        """Drop what waits and begin a session: answer the host's marker."""
        self.clear()
        self._buffer += MAGIC + nonce

    def resync(self) -> None:
        """Drop what waits and make the host begin anew."""
        self.clear()
        self._buffer += bytes(RESYNC_BYTES)

    def add(self, type_: str, fields: Mapping[str, Any], payload: bytes = b"") -> None:
        """Append one frame."""
        frame = encode_frame(type_, fields, payload)
        self._bulk.append(frame)
        self._bulk_bytes += len(frame)

    def add_urgent(self, type_: str, fields: Mapping[str, Any], payload: bytes = b"") -> None:
        """Append one frame that somebody waits for; it may overtake all that are not urgent."""
        frame = encode_frame(type_, fields, payload)
        self._urgent.append(frame)
        self._urgent_bytes += len(frame)

    def flush(self, write: Callable[[memoryview], int]) -> None:
        """Give `write` as much as it takes; it answers how many bytes it took, 0 for no more now."""
        self._refill()
        while self._buffer:
            with memoryview(self._buffer) as view:
                taken = write(view)
            del self._buffer[:taken]
            if not taken:
                return
            self._refill()

    def _refill(self) -> None:
        while len(self._buffer) < WRITE_BYTES and (self._urgent or self._bulk):
            if self._urgent:
                frame = self._urgent.popleft()
                self._urgent_bytes -= len(frame)
                self._buffer += frame
            if self._bulk:
                frame = self._bulk.popleft()
                self._bulk_bytes -= len(frame)
                self._buffer += frame


def _decode(header: bytes, payload: bytes) -> Message:
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise FrameError("a header is no JSON") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise FrameError("a header is no object with a type")
    return Message(fields.pop("type"), fields, payload)
