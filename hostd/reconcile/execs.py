"""Programs that run in guests for a caller, beside the agents: their ids, their windows, their ends. Knows no gRPC and no socket.

opened -- exec-started --> started -- exec-ended --> ended; abandoned by its caller or cut off with its session at any time

Whatever a guest says is put down and never waited for, so that a caller who reads slowly holds up no link: the guest may be
WINDOW_BYTES ahead of what the caller has taken, and one that is further ahead has broken the protocol.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fleet.errors import BedplateError, UnavailableError
from fleet.model.ids import SandboxId
from hostd.drivers.ports import LinkMessage
from hostd.reconcile.words import EXIT_CODE_MAX, SIGNAL_MAX, clean, parse_optional, parse_whole

# docs/guest-link.md: what may be on its way unacknowledged, in each direction of each program.
WINDOW_BYTES = 256 * 1024
# An acknowledgement for every quarter of the window keeps three quarters of it open, and small outputs cost no frame.
ACK_BYTES = WINDOW_BYTES // 4
OUTPUT_FRAME_BYTES_MAX = 64 * 1024
# As base64 64 KiB: a longer frame would hold up what is sent to the guest's other programs.
INPUT_FRAME_BYTES_MAX = 48 * 1024
# As guestd has it: several people with a few shells each.
EXECS_MAX = 16
# Of a command's first word in an event: a path is recognised, and a line of `mb events` stays one.
NAME_CHARS_MAX = 80
# Past so many pieces that wait for a slow caller, a piece is joined to the last of its stream: one byte in a piece costs a hundred.
PIECES_MAX = 64
# Under TCG on a crowded host a busy guest takes seconds to start a program; one that takes longer does not answer.
START_S_MAX = 60.0
# guestd kills what its caller left after 2 s. So long it may count among the guest's programs, should the end never be told.
CLOSING_S = 5.0

Send = Callable[[SandboxId, LinkMessage], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Terminal:
    """The terminal that a program gets: its size, and the value of TERM."""

    columns: int
    rows: int
    term: str


@dataclass(frozen=True, slots=True)
class Program:
    """What is to run, checked: `user` is "agent" or "root", no `terminal` means pipes."""

    command: tuple[str, ...]
    workdir: str
    env: tuple[tuple[str, str], ...] = ()
    user: str = "agent"
    terminal: Terminal | None = None

    @property
    def name(self) -> str:
        """The command's first word, for people: arguments may hold what nobody else is to read."""
        return clean(self.command[0])[:NAME_CHARS_MAX]

    def describe(self, number: int) -> dict[str, Any]:
        """The fields of `exec`."""
        terminal = self.terminal
        size = {"columns": terminal.columns, "rows": terminal.rows, "term": terminal.term} if terminal else None
        env = [list(variable) for variable in self.env]
        about = {"command": list(self.command), "workdir": self.workdir, "env": env, "user": self.user}
        return {"exec": number, **about, "terminal": size}


@dataclass(frozen=True, slots=True)
class ExecStarted:
    """The program runs."""


@dataclass(frozen=True, slots=True)
class ExecOutput:
    """Bytes that the program wrote; with a terminal all of them are `stdout`."""

    stream: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class ExecEnded:
    """The program's end: exit code or signal, or neither with a message saying why it could not be run."""

    exit_code: int | None
    signal: int | None
    message: str


ExecEvent = ExecStarted | ExecOutput | ExecEnded


class Exec:
    """One program, for the one caller who reads it with `next` and writes to it."""

    def __init__(self, number: int, send: Callable[[LinkMessage], Awaitable[None]]) -> None:
        self.number = number
        self._send = send
        self._pieces: deque[tuple[str, bytearray]] = deque()
        self._moved = asyncio.Event()
        self._is_started = self._has_told_start = False
        self._end: ExecEnded | None = None
        self._error: BedplateError | None = None
        self._received = self._taken = self._acked = 0
        self._sent = self._input_acked = 0
        self._has_room = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether the guest will say no more of it, or nobody listens."""
        return self._end is not None or self._error is not None

    async def next(self) -> ExecEvent:
        """What came next; ExecEnded is the last. What was given before counts as taken by the caller.

        Raises UnavailableError `exec_unanswered` when the guest does not start it in START_S_MAX, and what it was cut off with.
        """
        await self._acknowledge()
        try:
            async with asyncio.timeout(None if self._is_started else START_S_MAX):
                while (event := self._find_event()) is None:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError as error:
            message = f"the guest did not start the program within {START_S_MAX:.0f} s"
            raise UnavailableError("exec_unanswered", message, "see mb status NAME; try again") from error
        if isinstance(event, ExecOutput):
            self._taken += len(event.payload)
        return event

    async def write(self, content: bytes) -> None:
        """Gives the program input, waiting while its window is full; what comes after its end is dropped."""
        for start in range(0, len(content), INPUT_FRAME_BYTES_MAX):
            piece = content[start : start + INPUT_FRAME_BYTES_MAX]
            while self._sent + len(piece) - self._input_acked > WINDOW_BYTES and not self.is_over:
                self._has_room.clear()
                await self._has_room.wait()
            self._sent += len(piece)
            await self._say("exec-input", {"end": False}, piece)

    async def end_input(self) -> None:
        """Tells the program that no more input follows."""
        await self._say("exec-input", {"end": True})

    async def resize(self, columns: int, rows: int) -> None:
        """Gives the program's terminal another size."""
        await self._say("exec-resize", {"columns": columns, "rows": rows})

    async def signal(self, number: int) -> None:
        """Sends a signal to the program's process group."""
        await self._say("exec-signal", {"signal": number})

    def cut_off(self, error: BedplateError) -> None:
        """Ends it for its caller, with this error after the output that is there."""
        if not self.is_over:
            self._error = error
        self._moved.set()
        self._has_room.set()

    def take(self, message: LinkMessage) -> None:
        """Takes one frame of the guest; raises KeyError or ValueError for what no honest guest sends."""
        match message.type:
            case "exec-started":
                self._is_started = True
            case "exec-output":
                self._take_output(message.fields["stream"], message.payload)
            case "exec-input-ack":
                self._input_acked = max(self._input_acked, parse_whole(message.fields, "bytes", self._sent))
                self._has_room.set()
            case "exec-ended":
                self._end = _parse_end(message.fields)
                self._has_room.set()
        self._moved.set()

    def _take_output(self, stream: Any, payload: bytes) -> None:
        if stream not in ("stdout", "stderr") or len(payload) > OUTPUT_FRAME_BYTES_MAX:
            raise ValueError("output of no stream, or too much in one frame")
        self._received += len(payload)
        if self._received - self._acked > WINDOW_BYTES:
            raise ValueError(f"output past the window of {WINDOW_BYTES} bytes")
        if (piece := self._piece_to_join(stream, len(payload))) is not None:
            piece += payload
        elif payload:
            self._pieces.append((stream, bytearray(payload)))

    def _piece_to_join(self, stream: str, size: int) -> bytearray | None:
        """The piece that waits for the caller and that output can be added to: the last, or with many waiting its stream's last."""
        if len(self._pieces) >= PIECES_MAX:
            return next((piece for name, piece in reversed(self._pieces) if name == stream), None)
        if self._pieces and self._pieces[-1][0] == stream and len(self._pieces[-1][1]) + size <= OUTPUT_FRAME_BYTES_MAX:
            return self._pieces[-1][1]
        return None

    def _find_event(self) -> ExecEvent | None:
        if self._is_started and not self._has_told_start:
            self._has_told_start = True
            return ExecStarted()
        if self._pieces:
            stream, piece = self._pieces.popleft()
            return ExecOutput(stream, bytes(piece))
        if self._error is not None:
            raise self._error
        return self._end

    async def _acknowledge(self) -> None:
        if self._taken - self._acked >= ACK_BYTES:
            self._acked = self._taken
            await self._say("exec-ack", {"bytes": self._taken})

    async def _say(self, type_: str, fields: Mapping[str, Any], payload: bytes = b"") -> None:
        if not self.is_over:
            try:
                await self._send(LinkMessage(type_, {"exec": self.number, **fields}, payload))
            except UnavailableError as error:
                self.cut_off(error)


class Execs:
    """The programs of all guests of this host. Ids rise from `first_number` on: a restarted hostd begins beyond those before it."""

    def __init__(
        self,
        send: Send,
        clock: Callable[[], float] = time.monotonic,
        first_number: int | None = None,
    ) -> None:
        self._send = send
        self._clock = clock
        # Milliseconds since 1970: nobody begins a thousand programs in a second, and a restart takes longer than one.
        self._next = time.time_ns() // 1_000_000 if first_number is None else first_number
        self._running: dict[SandboxId, dict[int, Exec]] = {}
        # Programs that their callers left, with the time until which they may still be there.
        self._closing: dict[SandboxId, dict[int, float]] = {}
        self._goodbyes: set[asyncio.Task[None]] = set()

    async def open(self, sandbox_id: SandboxId, program: Program) -> Exec:
        """Begins a program in a guest. Raises UnavailableError `execs_exhausted` or `link_down`."""
        if self.count(sandbox_id) >= EXECS_MAX:
            message = f"the sandbox runs {EXECS_MAX} programs beside its agents already"
            raise UnavailableError("execs_exhausted", message, "end one of them, then try again")
        number, self._next = self._next, self._next + 1
        opened = Exec(number, lambda message: self._send(sandbox_id, message))
        self._running.setdefault(sandbox_id, {})[number] = opened
        try:
            await self._send(sandbox_id, LinkMessage("exec", program.describe(number)))
        except UnavailableError:
            self._running.get(sandbox_id, {}).pop(number, None)
            raise
        except BaseException:
            self.abandon(sandbox_id, opened)
            raise
        return opened

    def count(self, sandbox_id: SandboxId) -> int:
        """How many programs the guest has to run now."""
        now_s = self._clock()
        closing = {number: at_s for number, at_s in self._closing.get(sandbox_id, {}).items() if at_s > now_s}
        self._closing[sandbox_id] = closing
        return len(self._running.get(sandbox_id, {})) + len(closing)

    def abandon(self, sandbox_id: SandboxId, opened: Exec) -> None:
        """Its caller is gone: the guest is told to end it, unless it is over there. Waits for nothing; safe to repeat."""
        if self._running.get(sandbox_id, {}).pop(opened.number, None) is None:
            return
        opened.cut_off(UnavailableError("exec_abandoned", "the caller has gone", ""))
        self._closing.setdefault(sandbox_id, {})[opened.number] = self._clock() + CLOSING_S
        goodbye = asyncio.create_task(self._say_goodbye(sandbox_id, opened.number))
        self._goodbyes.add(goodbye)
        goodbye.add_done_callback(self._goodbyes.discard)

    def take(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        """Takes a guest's frame about one of its programs; of one that is over nothing is heard.

        Raises KeyError or ValueError for what no honest guest sends: a program that nobody began, output past its window.
        """
        number = parse_whole(message.fields, "exec")
        if number >= self._next:
            raise ValueError("a program that nobody began")
        if message.type == "exec-ended":
            self._closing.get(sandbox_id, {}).pop(number, None)
        found = self._running.get(sandbox_id, {}).get(number)
        if found is not None:
            found.take(message)
            # One that was cut off goes on in the guest until its caller leaves it, who has it closed there.
            if message.type == "exec-ended":
                del self._running[sandbox_id][number]

    def cut_off(self, sandbox_id: SandboxId, error: BedplateError) -> None:
        """Ends every program of a guest for its caller: the guest's session is over, and they with it."""
        self._closing.pop(sandbox_id, None)
        for opened in self._running.pop(sandbox_id, {}).values():
            opened.cut_off(error)

    async def _say_goodbye(self, sandbox_id: SandboxId, number: int) -> None:
        try:
            await self._send(sandbox_id, LinkMessage("exec-close", {"exec": number}))
        except UnavailableError:
            # The session has ended, and with it the program.
            return


def _parse_end(fields: Mapping[str, Any]) -> ExecEnded:
    exit_code = parse_optional(fields, "exit_code", EXIT_CODE_MAX)
    signal = parse_optional(fields, "signal", SIGNAL_MAX)
    return ExecEnded(exit_code, signal, clean(fields.get("message") or ""))
