"""Frames survive every cut, and nothing a guest sends costs more than one frame's memory."""

import json
import struct
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.drivers.guest.frames import (
    HEADER_BYTES_MAX,
    MAGIC,
    MARKER_BYTES,
    NONCE_BYTES,
    PAYLOAD_BYTES_MAX,
    FrameError,
    FrameReader,
    encode_frame,
)
from hostd.drivers.ports import LinkMessage

NONCE = bytes(range(NONCE_BYTES))
MARKER = MAGIC + NONCE
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=10))
FIELDS = st.dictionaries(st.text(max_size=8).filter(lambda name: name != "type"), SCALARS, max_size=4)
MESSAGES = st.lists(st.builds(LinkMessage, st.text(max_size=10), FIELDS, st.binary(max_size=300)), max_size=5)
CUTS = st.lists(st.integers(1, 40), min_size=1, max_size=20)


def pieces(content: bytes, sizes: list[int]) -> Iterable[bytes]:
    """The content in pieces of these sizes, over and over."""
    start = turn = 0
    while start < len(content):
        size = sizes[turn % len(sizes)]
        yield content[start : start + size]
        start, turn = start + size, turn + 1


def read_all(reader: FrameReader, parts: Iterable[bytes]) -> list[LinkMessage]:
    return [message for part in parts for message in reader.feed(part)]


def framed() -> FrameReader:
    reader = FrameReader()
    reader.expect(NONCE)
    assert list(reader.feed(MARKER)) == []
    return reader


@given(garbage=st.binary(max_size=100), messages=MESSAGES, sizes=CUTS)
def test_frames_survive_every_cut(garbage: bytes, messages: list[LinkMessage], sizes: list[int]) -> None:
    """Whatever comes before the marker, and however the bytes arrive: the messages are those that were sent."""
    reader = FrameReader()
    assert reader.expect(NONCE) == MARKER
    content = garbage + MARKER + b"".join(encode_frame(message) for message in messages)
    assert read_all(reader, pieces(content, sizes)) == messages


@given(stale=MESSAGES, messages=MESSAGES, sizes=CUTS)
def test_what_an_older_marker_answered_is_nothing(
    stale: list[LinkMessage], messages: list[LinkMessage], sizes: list[int]
) -> None:
    """Frames behind another nonce are discarded, as are those before any marker."""
    reader = FrameReader()
    reader.expect(NONCE)
    old = b"".join(encode_frame(message) for message in stale)
    content = old + MAGIC + NONCE[::-1] + old + MARKER + b"".join(map(encode_frame, messages))
    assert read_all(reader, pieces(content, sizes)) == messages


@given(content=st.binary(max_size=2_000), sizes=CUTS)
def test_noise_is_messages_or_one_error(content: bytes, sizes: list[int]) -> None:
    """No bytes raise anything but FrameError, before the marker or behind it."""
    hunting = FrameReader()
    hunting.expect(NONCE)
    assert read_all(hunting, pieces(content, sizes)) == []
    assert not hunting.is_framed
    try:
        read_all(framed(), pieces(content, sizes))
    except FrameError:
        return


@given(header=st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10))
def test_a_header_is_an_object_with_a_type(header: Any) -> None:
    """JSON of another shape is an error, an object with a type a message."""
    text = json.dumps(header).encode()
    frame = struct.pack(">II", len(text), 0) + text
    is_message = isinstance(header, dict) and isinstance(header.get("type"), str)
    if not is_message:
        with pytest.raises(FrameError):
            list(framed().feed(frame))
        return
    (message,) = framed().feed(frame)
    assert {**message.fields, "type": message.type} == header


BOMBS = {
    "deep lists": b"[" * HEADER_BYTES_MAX,
    "deep objects": b'{"a":' * (HEADER_BYTES_MAX // 5),
    "long number": b'{"type":"x","n":' + b"9" * 8_000 + b"}",
    "not a number": b'{"type":"x","n":NaN}',
    "infinity": b'{"type":"x","n":-Infinity}',
    "utf-16": '{"type":"x"}'.encode("utf-16"),
    "no utf-8": b'{"type":"\xff"}',
    "two values": b'{"type":"x"}{}',
    "bom": b'\xef\xbb\xbf{"type":"x"}',
    "type is no text": b'{"type":1}',
    "blank": b"  ",
}


@pytest.mark.parametrize("header", BOMBS.values(), ids=BOMBS.keys())
def test_a_json_bomb_is_an_error(header: bytes) -> None:
    """Nesting, numbers and encodings that a parser could choke on end the session and nothing else."""
    with pytest.raises(FrameError):
        list(framed().feed(struct.pack(">II", len(header), 0) + header))


@pytest.mark.parametrize(
    "lengths",
    [(0, 0), (1, 0), (HEADER_BYTES_MAX + 1, 0), (2, PAYLOAD_BYTES_MAX + 1), (2**32 - 1, 2**32 - 1)],
)
def test_lengths_past_the_limits(lengths: tuple[int, int]) -> None:
    """A frame past its limits is refused by its first eight bytes, before anything is kept of it."""
    with pytest.raises(FrameError):
        list(framed().feed(struct.pack(">II", *lengths)))


def test_a_frame_at_the_limits() -> None:
    """The largest frame passes both ways, one byte more does not leave."""
    room = HEADER_BYTES_MAX - len(b'{"a":"","type":"x"}')
    largest = LinkMessage("x", {"a": "a" * room}, bytes(PAYLOAD_BYTES_MAX))
    assert list(framed().feed(encode_frame(largest))) == [largest]
    with pytest.raises(ValueError, match="past the limits"):
        encode_frame(LinkMessage("x", {"a": "a" * (room + 1)}))
    with pytest.raises(ValueError, match="past the limits"):
        encode_frame(LinkMessage("x", {}, bytes(PAYLOAD_BYTES_MAX + 1)))


def test_garbage_is_not_kept() -> None:
    """A guest that never answers the marker costs no memory: what cannot be part of one is dropped."""
    reader = FrameReader()
    reader.expect(NONCE)
    for _ in range(200):
        assert list(reader.feed(MAGIC * 1_000)) == []
        # A promise that cannot be seen from outside.
        assert len(reader._buffer) < MARKER_BYTES
    assert list(reader.feed(MARKER)) == []
    assert reader.is_framed


def test_messages_before_an_error_are_given() -> None:
    """What was whole before the protocol broke has been said."""
    messages = framed().feed(encode_frame(LinkMessage("hello")) + bytes(8))
    assert next(messages).type == "hello"
    with pytest.raises(FrameError):
        next(messages)
