"""guestd's loop on a socket, with hostd's own frames on the other end. No agent runs here: nothing configures this machine."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestd.guest import Guest
from guestd.link import MAGIC, RESYNC_BYTES, Outbox
from guestd.loop import Loop
from guestd.port import Port, open_port
from guestd.secrets import Secrets
from guestd.state import State
from hostd.drivers.guest.frames import FrameReader, encode_frame
from hostd.drivers.ports import LinkMessage

NONCE = bytes(range(16))
# The most that a turn may wait for what never comes.
TURN_S = 5.0


class Pair:
    """A guestd, and hostd's end of its port."""

    def __init__(self, folder: Path) -> None:
        self.host, guest = socket.socketpair()
        self.host.setblocking(False)
        state, outbox = State(str(folder), "a boot"), Outbox()
        self._nudges, self._port = state.open_nudges(), Port(os.dup(guest.fileno()))
        guest.close()
        self.guest = Guest(
            state,
            outbox,
            secrets=Secrets(str(folder / "secrets")),
            sources_folder=str(folder / "sources"),
            cgroups=str(folder / "cgroups"),
        )
        self.loop = Loop(self._port, self._nudges, self.guest, outbox)
        self.reader = FrameReader()

    def say(self, content: bytes) -> None:
        """Sends bytes and lets guestd take them."""
        self.host.sendall(content)
        self.loop.turn(TURN_S)

    def hear(self) -> bytes:
        """What guestd has sent by now."""
        heard = b""
        while True:
            try:
                content = self.host.recv(1 << 20)
            except BlockingIOError:
                return heard
            heard += content
            self.loop.turn(0)

    def begin(self) -> list[LinkMessage]:
        """A session; its first messages."""
        self.say(self.reader.expect(NONCE))
        return list(self.reader.feed(self.hear()))

    def close(self) -> None:
        self.host.close()
        os.close(self._nudges)
        os.close(self._port.descriptor)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """A guestd that waits for a host."""
    made = Pair(tmp_path / "guestd")
    yield made
    made.close()


def test_a_marker_is_answered_with_hello(pair: Pair) -> None:
    """The first frame says who this is and that nothing is configured."""
    (hello,) = pair.begin()
    assert hello.type == "hello"
    assert (hello.fields["version"], hello.fields["configured"], hello.fields["agents"]) == (2, False, {})


def test_every_marker_begins_a_session(pair: Pair) -> None:
    """Markers that waited while nobody read are answered by one session, that of the last."""
    stale = MAGIC + bytes(16)
    pair.say(stale + stale + pair.reader.expect(NONCE))
    heard = pair.hear()
    assert heard.startswith(MAGIC + NONCE)
    (hello,) = pair.reader.feed(heard)
    assert hello.type == "hello"
    assert [message.type for message in pair.begin()] == ["hello"]


def test_a_configuration_that_is_wrong_is_told_in_every_session(pair: Pair, tmp_path: Path) -> None:
    """It fails once, is not tried again, and a restarted guestd says the same."""
    pair.begin()
    pair.say(encode_frame(LinkMessage("configure", {"hostname": "box", "agents": []})))
    (failed,) = pair.reader.feed(pair.hear())
    assert (failed.type, failed.fields["code"]) == ("failed", "configuration_invalid")
    pair.say(encode_frame(LinkMessage("configure", {"hostname": "other"})))
    assert pair.hear() == b""
    again = Pair(tmp_path / "guestd")
    hello, told = again.begin()
    assert (hello.fields["configured"], told.fields) == (True, failed.fields)
    again.close()


@pytest.mark.parametrize(
    "frame",
    [
        b"\0\0\0\0\0\0\0\0",
        encode_frame(LinkMessage("ack", {"agent": ["a"], "offset": 1})),
        encode_frame(LinkMessage("resume", {"agents": 7, "artifact": 0})),
        encode_frame(LinkMessage("resume", {"agents": {}, "artifact": "x"})),
        encode_frame(LinkMessage("resume", {"agents": {}, "artifact": float("inf")})),
        encode_frame(LinkMessage("ack")),
    ],
)
def test_a_host_that_makes_no_sense_must_begin_anew(pair: Pair, frame: bytes) -> None:
    """guestd does not die of it: it sends what no frame can be and waits for the next marker."""
    pair.begin()
    pair.say(frame)
    assert pair.hear() == bytes(RESYNC_BYTES)
    assert [message.type for message in pair.begin()] == ["hello"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(
        ["ack", "resume", "stop", "collect", "configure", "secret", "exec", "exec-input", "exec-close", "novel"]
    ),
    st.dictionaries(
        st.sampled_from(
            ["agent", "agents", "artifact", "offset", "grace_period_s", "sources", "address", "name", "exec"]
        ),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
    ),
)
def test_no_field_kills_guestd(pair: Pair, type_: str, fields: dict[str, object]) -> None:
    """Whatever a known message says, the next session begins with hello."""
    pair.begin()
    pair.say(encode_frame(LinkMessage(type_, fields)))
    pair.hear()
    assert pair.begin()[0].type == "hello"


def test_a_guest_that_waits_is_heard(pair: Pair) -> None:
    """A guest that is not configured yet, because its secrets are awaited, beats as any other; its host would give it up."""
    pair.begin()
    pair.guest.beat(1.0)
    pair.loop.turn(0)
    (beat,) = pair.reader.feed(pair.hear())
    assert (beat.type, beat.fields["uptime_s"]) == ("heartbeat", 1.0)


def test_a_host_that_hangs_up_leaves_nothing_behind(pair: Pair) -> None:
    """After a hang-up guestd is silent and does not spin: it waits its turn."""
    pair.begin()
    pair.host.close()
    for _ in range(3):
        pair.loop.turn(0)
    assert pair.loop._is_hung_up


def test_a_port_is_found_by_its_name(tmp_path: Path) -> None:
    """Without udev: the kernel's own folder says which port is ours."""
    for entry, name in (("null", "org.bedplate.guest.0\n"), ("vport0p2", "other\n")):
        (tmp_path / entry).mkdir()
        (tmp_path / entry / "name").write_text(name)
    port = open_port(ports_dir=str(tmp_path))
    assert Path(f"/proc/self/fd/{port.descriptor}").readlink() == Path("/dev/null")
    os.close(port.descriptor)
