"""Frames and markers on the guest's side: nothing that arrives, however it is cut, breaks or misleads it; hostd understands it."""

from itertools import cycle, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.link import (
    HEADER_BYTES_MAX,
    MAGIC,
    PAYLOAD_BYTES_MAX,
    RESYNC_BYTES,
    FrameError,
    FrameReader,
    Outbox,
    encode_frame,
)
from hostd.drivers.guest import frames as host
from hostd.drivers.ports import LinkMessage

NONCE = bytes(range(16))
MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["ack", "resume", "stop"]),
        st.dictionaries(st.text(max_size=5).filter(lambda key: key != "type"), st.integers() | st.text(), max_size=3),
    ),
    max_size=5,
)


def cut(content: bytes, places: list[int]) -> list[bytes]:
    """`content` in pieces, cut at places modulo its length."""
    marks = sorted({0, len(content), *(place % (len(content) + 1) for place in places)})
    return [content[start:end] for start, end in pairwise(marks)]


def feed_all(reader: FrameReader, pieces: list[bytes]) -> tuple[list[bytes], list[tuple[str, dict[str, object]]]]:
    """Nonces and messages; messages before a marker are dropped, as guestd does."""
    nonces: list[bytes] = []
    messages: list[tuple[str, dict[str, object]]] = []
    for piece in pieces:
        nonce, found = reader.feed(piece)
        if nonce is not None:
            nonces.append(nonce)
            messages.clear()
        messages += [(message.type, dict(message.fields)) for message in found]
    return nonces, messages


@given(MESSAGES, st.lists(st.integers(0, 10_000)), st.binary(max_size=200).filter(lambda junk: MAGIC not in junk))
def test_a_session_is_understood_however_it_is_cut(
    sent: list[tuple[str, dict[str, object]]], places: list[int], stale: bytes
) -> None:
    """Whatever lies on the port before the marker, and wherever reads end, exactly the frames after the marker are taken."""
    frames = b"".join(host.encode_frame(LinkMessage(type_, fields)) for type_, fields in sent)
    nonces, messages = feed_all(FrameReader(), cut(stale + MAGIC + NONCE + frames, places))
    assert (nonces, messages) == ([NONCE], sent)


@given(MESSAGES.filter(bool), st.integers(1, 10_000), st.lists(st.integers(0, 10_000)))
def test_a_hang_up_that_nobody_saw_costs_nothing(
    sent: list[tuple[str, dict[str, object]]], lost: int, places: list[int]
) -> None:
    """A marker in the middle of a frame, whose rest was lost, begins a new session: a header cannot hold MAGIC."""
    frame = host.encode_frame(LinkMessage("configure", {"text": "x" * 100}))
    reader = FrameReader()
    reader.feed(MAGIC + NONCE + frame[: lost % len(frame)])
    frames = b"".join(host.encode_frame(LinkMessage(type_, fields)) for type_, fields in sent)
    pieces = [MAGIC + NONCE[::-1], *cut(frames, places)]
    assert feed_all(reader, pieces) == ([NONCE[::-1]], sent)


@given(st.lists(st.binary(max_size=100), max_size=20))
def test_garbage_is_a_frame_error_or_nothing(pieces: list[bytes]) -> None:
    """No bytes raise anything but FrameError, and after it the reader hunts: the next marker is found."""
    reader = FrameReader()
    reader.feed(MAGIC + NONCE)
    for piece in pieces:
        try:
            reader.feed(piece)
        except FrameError:
            break
    assert reader.feed(MAGIC + NONCE)[0] == NONCE


@pytest.mark.parametrize(
    "head",
    [
        (1).to_bytes(4, "big") + (0).to_bytes(4, "big"),
        (HEADER_BYTES_MAX + 1).to_bytes(4, "big") + (0).to_bytes(4, "big"),
        (2).to_bytes(4, "big") + (PAYLOAD_BYTES_MAX + 1).to_bytes(4, "big"),
        (2).to_bytes(4, "big") + (0).to_bytes(4, "big") + b"[]",
        (2).to_bytes(4, "big") + (0).to_bytes(4, "big") + b"{}",
        (2).to_bytes(4, "big") + (0).to_bytes(4, "big") + b"\xff\xff",
    ],
)
def test_a_frame_past_the_rules_is_refused(head: bytes) -> None:
    """Lengths past the limits and headers that are no object with a type end the session, before anything is kept."""
    reader = FrameReader()
    reader.feed(MAGIC + NONCE)
    with pytest.raises(FrameError):
        reader.feed(head)


def test_memory_is_bounded_while_hunting() -> None:
    """A gigabyte of noise without a marker leaves less than a marker behind."""
    reader = FrameReader()
    for _ in range(1000):
        reader.feed(b"\0" * 65536)
    assert len(reader._buffer) < len(MAGIC)


@given(st.binary(max_size=1000), st.lists(st.integers(0, 300), min_size=1).filter(any))
def test_the_host_understands_what_is_written(payload: bytes, counts: list[int]) -> None:
    """Frames reach hostd's own reader whole, however little the port takes at once."""
    outbox, wire, takes = Outbox(), bytearray(), cycle(counts)
    outbox.restart(NONCE)
    outbox.add("output", {"agent": "a", "offset": 7}, payload)

    def write(content: memoryview) -> int:
        taken = content[: next(takes)]
        wire.extend(taken)
        return len(taken)

    while not outbox.is_empty:
        outbox.flush(write)
    reader = host.FrameReader()
    reader.expect(NONCE)
    (message,) = reader.feed(bytes(wire))
    assert (message.type, message.fields, message.payload) == ("output", {"agent": "a", "offset": 7}, payload)


@pytest.mark.parametrize("sent_bytes", [0, 1, 7, 8, 20, 1000, 8 + 30 + PAYLOAD_BYTES_MAX - 1])
def test_a_resync_ends_the_hosts_session(sent_bytes: int) -> None:
    """In whatever frame a killed guestd left the host, what the next one sends is no frame; a hunting host ignores it."""
    frame = encode_frame("output", {"agent": "a", "offset": 0}, bytes(PAYLOAD_BYTES_MAX))
    reader = host.FrameReader()
    marker = reader.expect(NONCE)
    outbox, wire = Outbox(), bytearray()
    outbox.resync()
    outbox.flush(lambda content: wire.extend(content) or len(content))
    assert len(wire) == RESYNC_BYTES
    assert list(reader.feed(bytes(wire))) == []
    with pytest.raises(host.FrameError):
        list(reader.feed(marker + frame[:sent_bytes] + wire))


def test_an_outbox_has_room_for_a_frame_or_two() -> None:
    """Streams are asked for no more than what keeps the port busy."""
    outbox = Outbox()
    added = 0
    while outbox.has_room:
        outbox.add("output", {}, bytes(PAYLOAD_BYTES_MAX))
        added += 1
    assert added == 2
    outbox.clear()
    assert outbox.is_empty


def test_urgent_frames_overtake_and_never_starve() -> None:
    """What a person waits for is behind one frame of bulk at most; bulk gets every second place however much is urgent."""
    outbox, wire = Outbox(), bytearray()
    outbox.restart(NONCE)
    for number in range(3):
        outbox.add("output", {"number": number}, bytes(PAYLOAD_BYTES_MAX))
    for number in range(3):
        outbox.add_urgent("exec-output", {"number": number}, bytes(PAYLOAD_BYTES_MAX // 4))
    outbox.flush(lambda content: wire.extend(content) or len(content))
    reader = host.FrameReader()
    reader.expect(NONCE)
    found = [(message.type, message.fields["number"]) for message in reader.feed(bytes(wire))]
    assert [number for type_, number in found if type_ == "output"] == [0, 1, 2]
    assert [number for type_, number in found if type_ == "exec-output"] == [0, 1, 2]
    assert [type_ for type_, _ in found] == ["exec-output", "output"] * 3
    assert outbox.is_empty
    assert outbox.has_room
    assert outbox.has_urgent_room
