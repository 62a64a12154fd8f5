"""Programs in guests: windows both ways, one frame at a time, and a guest that lies about them."""

import asyncio
from typing import Any

import pytest

from fleet.errors import UnavailableError
from fleet.model.ids import SandboxId
from hostd.drivers.ports import LinkMessage
from hostd.reconcile.execs import (
    ACK_BYTES,
    CLOSING_S,
    EXECS_MAX,
    INPUT_FRAME_BYTES_MAX,
    OUTPUT_FRAME_BYTES_MAX,
    PIECES_MAX,
    WINDOW_BYTES,
    Exec,
    ExecEnded,
    ExecOutput,
    Execs,
    ExecStarted,
    Program,
    Terminal,
)

pytestmark = pytest.mark.timeout(30)
A, B = SandboxId("aaaaaaaaaaaa"), SandboxId("bbbbbbbbbbbb")
SHELL = Program(("sh",), "/workspace", (("A", "b"),), "root", Terminal(80, 24, "xterm"))


class Link:
    """The guest's end: what it was sent, and a time that the test tells."""

    def __init__(self) -> None:
        self.sent: list[LinkMessage] = []
        self._moved = asyncio.Event()
        self.is_down = False
        self.now_s = 0.0
        self.execs = Execs(self.send, lambda: self.now_s, first_number=7)

    async def send(self, _sandbox_id: SandboxId, message: LinkMessage) -> None:
        if self.is_down:
            raise UnavailableError("link_down", "down", "")
        self.sent.append(message)
        self._moved.set()

    async def until_sent(self, type_: str, count: int = 1) -> None:
        while len(self.of_type(type_)) < count:
            self._moved.clear()
            await self._moved.wait()

    def say(self, type_: str, opened: Exec, payload: bytes = b"", **fields: Any) -> None:
        self.execs.take(A, LinkMessage(type_, {"exec": opened.number, **fields}, payload))

    def print(self, opened: Exec, payload: bytes, stream: str = "stdout") -> None:
        self.say("exec-output", opened, payload, stream=stream)

    def of_type(self, type_: str) -> list[LinkMessage]:
        return [message for message in self.sent if message.type == type_]


async def test_the_guest_is_told_all_of_the_program() -> None:
    """Command, directory, environment, user and terminal; ids rise."""
    link = Link()
    await link.execs.open(A, SHELL)
    await link.execs.open(B, Program(("ls", "-l"), "/"))
    assert [message.fields for message in link.of_type("exec")] == [
        {
            "exec": 7,
            "command": ["sh"],
            "workdir": "/workspace",
            "env": [["A", "b"]],
            "user": "root",
            "terminal": {"columns": 80, "rows": 24, "term": "xterm"},
        },
        {"exec": 8, "command": ["ls", "-l"], "workdir": "/", "env": [], "user": "agent", "terminal": None},
    ]


async def test_what_comes_is_given_in_order() -> None:
    """Start, output by stream, end; the caller gets all of it though the end came before it read."""
    link = Link()
    opened = await link.execs.open(A, SHELL)
    link.say("exec-started", opened)
    link.print(opened, b"a")
    link.print(opened, b"b", "stderr")
    link.print(opened, b"c")
    link.say("exec-ended", opened, exit_code=None, signal=9, message="\x1b[2Jkilled")
    assert [await opened.next() for _ in range(5)] == [
        ExecStarted(),
        ExecOutput("stdout", b"a"),
        ExecOutput("stderr", b"b"),
        ExecOutput("stdout", b"c"),
        ExecEnded(None, 9, " [2Jkilled"),
    ]


async def test_output_is_acknowledged_once_it_is_taken() -> None:
    """The guest's window opens when the caller asks for more, and not when the bytes arrive."""
    link = Link()
    opened = await link.execs.open(A, SHELL)
    for _ in range(WINDOW_BYTES // OUTPUT_FRAME_BYTES_MAX):
        link.print(opened, bytes(OUTPUT_FRAME_BYTES_MAX))
    first = await opened.next()
    assert isinstance(first, ExecOutput)
    assert link.of_type("exec-ack") == []
    await opened.next()
    (ack,) = link.of_type("exec-ack")
    assert ack.fields["bytes"] == len(first.payload) >= ACK_BYTES
    link.print(opened, bytes(OUTPUT_FRAME_BYTES_MAX))


async def test_a_guest_past_its_window_has_broken_the_protocol() -> None:
    """One byte more than the window, or more in a frame than one may hold: refused."""
    link = Link()
    opened = await link.execs.open(A, SHELL)
    for _ in range(WINDOW_BYTES // OUTPUT_FRAME_BYTES_MAX):
        link.print(opened, bytes(OUTPUT_FRAME_BYTES_MAX))
    with pytest.raises(ValueError, match="window"):
        link.print(opened, b"x")
    other = await link.execs.open(A, SHELL)
    with pytest.raises(ValueError, match="too much"):
        link.print(other, bytes(OUTPUT_FRAME_BYTES_MAX + 1))


async def test_tiny_output_costs_little_memory() -> None:
    """A window full of single bytes on alternating streams is held in few pieces, and each stream's order stays."""
    link = Link()
    opened = await link.execs.open(A, SHELL)
    for index in range(20_000):
        link.print(opened, bytes([index // 2 % 251]), ("stdout", "stderr")[index % 2])
    # A promise that cannot be seen from outside.
    assert len(opened._pieces) <= PIECES_MAX + 1
    link.say("exec-ended", opened, exit_code=0)
    streams = {"stdout": b"", "stderr": b""}
    while not isinstance(event := await opened.next(), ExecEnded):
        assert isinstance(event, ExecOutput)
        streams[event.stream] += event.payload
    assert streams == dict.fromkeys(streams, bytes(index % 251 for index in range(10_000)))


async def test_input_waits_for_its_window() -> None:
    """No more than the window is on its way; each acknowledgement lets as much follow; the end comes last."""
    link = Link()
    opened = await link.execs.open(A, SHELL)
    content = bytes(range(256)) * (3 * WINDOW_BYTES // 256)

    async def feed() -> None:
        await opened.write(content)
        await opened.end_input()

    feeding = asyncio.create_task(feed())
    taken = 0
    while not feeding.done():
        await asyncio.sleep(0)
        sent = sum(len(message.payload) for message in link.of_type("exec-input"))
        assert taken <= sent <= taken + WINDOW_BYTES
        if sent > taken:
            taken = sent
            link.say("exec-input-ack", opened, bytes=taken)
    inputs = link.of_type("exec-input")
    assert b"".join(message.payload for message in inputs) == content
    assert max(len(message.payload) for message in inputs) == INPUT_FRAME_BYTES_MAX
    assert [message.fields["end"] for message in inputs] == [False] * (len(inputs) - 1) + [True]


@pytest.mark.parametrize("end", ["ended", "cut off", "link down"])
async def test_a_writer_never_waits_for_what_is_over(end: str) -> None:
    """A program that ends with its window full sets its caller free; what it did not read is dropped."""
    link = Link()
    opened = await link.execs.open(A, SHELL)
    writing = asyncio.create_task(opened.write(bytes(2 * WINDOW_BYTES)))
    await link.until_sent("exec-input", WINDOW_BYTES // INPUT_FRAME_BYTES_MAX)
    match end:
        case "ended":
            link.say("exec-ended", opened, exit_code=0)
        case "cut off":
            link.execs.cut_off(A, UnavailableError("guest_link_lost", "", ""))
        case "link down":
            link.is_down = True
            link.say("exec-input-ack", opened, bytes=INPUT_FRAME_BYTES_MAX)
    await writing
    assert opened.is_over


LIES: list[tuple[str, dict[str, Any]]] = [
    ("exec-output", {"stream": "stdin"}),
    ("exec-output", {"stream": ["stdout"]}),
    ("exec-output", {}),
    ("exec-input-ack", {"bytes": 1}),
    ("exec-input-ack", {"bytes": -1}),
    ("exec-input-ack", {"bytes": True}),
    ("exec-input-ack", {}),
    ("exec-ended", {"exit_code": 256}),
    ("exec-ended", {"exit_code": "0"}),
    ("exec-ended", {"signal": -9}),
    *(("exec-started", {"exec": number}) for number in (8, 2**62, -1, 7.0, "7", None, True)),
]


@pytest.mark.parametrize(("type_", "fields"), LIES, ids=range(len(LIES)))
async def test_a_lie_is_refused(type_: str, fields: dict[str, Any]) -> None:
    """Streams, numbers and programs that there are not; input acknowledged that was never sent."""
    link = Link()
    opened = await link.execs.open(A, SHELL)
    with pytest.raises((KeyError, ValueError)):
        link.say(type_, opened, b"", **fields)


async def test_what_is_over_is_not_heard() -> None:
    """Frames about a program that ended, was left or is another guest's change nothing and are no offence."""
    link = Link()
    opened, left = await link.execs.open(A, SHELL), await link.execs.open(A, SHELL)
    elsewhere = await link.execs.open(B, SHELL)
    link.say("exec-ended", opened, exit_code=0)
    link.execs.abandon(A, left)
    for over in (opened, left, elsewhere):
        for _ in range(10):
            link.print(over, bytes(OUTPUT_FRAME_BYTES_MAX))
        link.say("exec-ended", over, exit_code=1)
    assert await opened.next() == ExecEnded(0, None, "")
    assert not elsewhere.is_over
    link.execs.take(A, LinkMessage("exec-ended", {"exec": 1, "exit_code": 0}))


async def test_a_program_left_is_closed_once() -> None:
    """The guest is told once, not at all of one that has ended or went with its session; nobody waits for the telling."""
    link = Link()
    left, ended, lost = [await link.execs.open(sandbox_id, SHELL) for sandbox_id in (A, A, B)]
    link.say("exec-ended", ended, exit_code=0)
    link.execs.cut_off(B, UnavailableError("guest_link_lost", "", ""))
    for _ in range(2):
        link.execs.abandon(A, left)
        link.execs.abandon(A, ended)
        link.execs.abandon(B, lost)
    await link.until_sent("exec-close")
    assert [message.fields for message in link.of_type("exec-close")] == [{"exec": left.number}]


async def test_a_program_that_was_cut_off_is_closed_when_it_is_left() -> None:
    """Output that arrives between a caller's mistake and its leaving does not let the program run on unwatched."""
    link = Link()
    opened = await link.execs.open(A, SHELL)
    opened.cut_off(UnavailableError("request_invalid", "", ""))
    link.print(opened, b"more")
    link.execs.abandon(A, opened)
    await link.until_sent("exec-close")
    assert link.execs.count(A) == 1


async def test_a_guest_runs_so_many_and_no_more() -> None:
    """The next is refused, also while one that was left may still be there; never for longer than its killing takes."""
    link = Link()
    crowd = [await link.execs.open(A, SHELL) for _ in range(EXECS_MAX)]
    await link.execs.open(B, SHELL)
    link.execs.abandon(A, crowd[0])
    with pytest.raises(UnavailableError) as caught:
        await link.execs.open(A, SHELL)
    assert caught.value.code == "execs_exhausted"
    link.now_s += CLOSING_S + 1
    await link.execs.open(A, SHELL)
    link.execs.abandon(A, crowd[1])
    link.say("exec-ended", crowd[1], signal=1)
    await link.execs.open(A, SHELL)


async def test_a_program_that_cannot_be_sent_takes_no_place() -> None:
    """A link that is down is told, and nothing is left of the attempt."""
    link = Link()
    link.is_down = True
    for _ in range(EXECS_MAX + 1):
        with pytest.raises(UnavailableError) as caught:
            await link.execs.open(A, SHELL)
        assert caught.value.code == "link_down"
