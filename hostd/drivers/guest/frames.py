"""The frames of docs/guest-link.md: bytes to messages and back, within limits. PURE.

hunting -- MAGIC with my latest nonce --> framed -- any fault --> FrameError: the session is over
"""

import base64
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hostd.drivers.ports import LinkMessage

MAGIC = b"\x00BEDPLATE-LINK\x01\n"
NONCE_BYTES = 16
MARKER_BYTES = len(MAGIC) + NONCE_BYTES
HEADER_BYTES_MAX = 16 * 1024
PAYLOAD_BYTES_MAX = 256 * 1024

_LENGTHS = struct.Struct(">II")


class FrameError(Exception):
    """The peer broke the protocol; str() says how."""


def encode_frame(message: LinkMessage) -> bytes:
    """The frame of a message; raises ValueError past the limits."""
    header = json.dumps({**message.fields, "type": message.type}, separators=(",", ":")).encode()
    if len(header) > HEADER_BYTES_MAX or len(message.payload) > PAYLOAD_BYTES_MAX:
        raise ValueError(f"a {message.type} frame of {len(header)} + {len(message.payload)} bytes is past the limits")
    return _LENGTHS.pack(len(header), len(message.payload)) + header + message.payload


def encode_for_guest(message: LinkMessage) -> bytes:
    """The frame of a message to a guest: its payload as base64, so that nothing in it is taken for MAGIC; ValueError as above."""
    return encode_frame(replace(message, payload=base64.b64encode(message.payload)) if message.payload else message)


class FrameReader:
    """Takes bytes as they come and gives messages; holds at most one frame and what was fed last."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._nonce = b""
        self._is_framed = False
        # The size of the frame that was given last, for whoever counts what it costs.
        self.header_bytes = self.payload_bytes = 0

    @property
    def is_framed(self) -> bool:
        """Whether the peer has answered the latest marker."""
        return self._is_framed

    def expect(self, nonce: bytes) -> bytes:
        """Begin to hunt for the answer to a new marker; returns the marker to send."""
        assert len(nonce) == NONCE_BYTES
        self._nonce, self._is_framed = nonce, False
        return MAGIC + nonce

    def feed(self, content: bytes) -> Iterator[LinkMessage]:
        """The messages that are complete with `content`; raises FrameError when the peer broke the protocol."""
        self._buffer += content
        if not self._is_framed and not self._hunt():
            return
        while (message := self._take()) is not None:
            yield message

    def _hunt(self) -> bool:
        marker = MAGIC + self._nonce
        found = self._buffer.find(marker)
        if found < 0:
            # What is older than one marker can never become part of one.
            del self._buffer[: max(0, len(self._buffer) - MARKER_BYTES + 1)]
            return False
        del self._buffer[: found + MARKER_BYTES]
        self._is_framed = True
        return True

    def _take(self) -> LinkMessage | None:
        if len(self._buffer) < _LENGTHS.size:
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
        self.header_bytes, self.payload_bytes = header_bytes, payload_bytes
        return _decode(header, payload)


def _decode(header: bytes, payload: bytes) -> LinkMessage:
    try:
        fields: Any = json.loads(header.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FrameError("a header is no JSON") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise FrameError("a header is no object with a type")
    return LinkMessage(fields.pop("type"), fields, payload)


def _refuse(constant: str) -> None:
    # Python's reader takes NaN and Infinity, RFC 8259 does not.
    raise ValueError(constant)
