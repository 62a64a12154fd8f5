"""Runs a program in a sandbox with this process's standard streams, its terminal and its signals.

keyboard, pipe -> thread -> Outbox -> call -> guest
signals, window size ----^           call -> stdout, stderr
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from fleet.errors import UnavailableError
from fleet.model.units import KIB
from mb.client import Client
from mb.program import Ended, Input, Printed, Program, Sent, Signal, exit_of
from mb.render.output import OutputPrinter
from mb.terminal import LetGo, is_terminal, raw_terminal, terminal_size

STDIN, STDOUT = 0, 1
READ_BYTES = 64 * KIB
# What is read here and not sent yet: enough to keep a call busy, little enough that a slow guest holds the reader back.
INPUTS_MAX = 4
# Signals and sizes that wait for the call; a user cannot mean more.
CONTROLS_MAX = 64
# Of Ctrl-C without an end of the program; then mb lets go of it, which ends it.
INTERRUPTS_MAX = 3

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# With a terminal these mean mb itself: the keyboard's signals travel as keys.
_OWN_WITH_TERMINAL = frozenset({signal.SIGTERM, signal.SIGHUP})


class Outbox:
    """What waits to be sent to a program; bounded, and filled from a thread that may wait."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Sent] = asyncio.Queue()
        self._room = threading.Semaphore(INPUTS_MAX)
        self._is_closed = False

    def put(self, part: Sent) -> None:
        """A signal or a size; dropped when too many wait."""
        if self._queue.qsize() < CONTROLS_MAX:
            self._queue.put_nowait(part)

    def write(self, payload: bytes) -> int:
        """Input (none of it: its end) from another thread; waits for room. Raises BrokenPipeError when nothing is sent any more."""
        self._room.acquire()
        if self._is_closed:
            raise BrokenPipeError("the program has ended")
        with suppress(RuntimeError):  # the loop is closed: mb is ending
            self._loop.call_soon_threadsafe(self._queue.put_nowait, Input(payload))
        return len(payload)

    def fail(self) -> None:
        """From another thread: what was written is not whole; the program is hung up on."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, Signal(signal.SIGHUP))

    async def parts(self) -> AsyncIterator[Sent]:
        """Everything that is put in, for ever."""
        while True:
            part = await self._queue.get()
            yield part
            if isinstance(part, Input):
                self._room.release()

    def close(self) -> None:
        """Lets writers go."""
        self._is_closed = True
        self._room.release(INPUTS_MAX)


async def run_here(client: Client, program: Program, *, reads_input: bool) -> Ended | None:
    """How the program ended; None when the user let go of it, which ends it too."""
    outbox, let_go = Outbox(), asyncio.Event()
    with ExitStack() as stack:
        stack.callback(outbox.close)
        has_terminal = program.terminal is not None
        enter = None
        if has_terminal and is_terminal(STDIN):
            enter = stack.enter_context(raw_terminal(STDIN))
        stack.enter_context(_signals_forwarded(outbox, let_go, enter, has_terminal=has_terminal))
        if reads_input:
            _start_reader(outbox, let_go, watches=enter is not None)
        else:
            outbox.put(Input(b""))
        running = asyncio.ensure_future(_print_to_end(client, program, outbox))
        leaving = asyncio.ensure_future(let_go.wait())
        try:
            await asyncio.wait((running, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not running.done():
                running.cancel()
        with suppress(asyncio.CancelledError):
            return await running
    return None


def report_end(ended: Ended, otherwise: int) -> int:
    """The exit code for how a program ended; says on stderr why one could not be run."""
    if ended.message:
        OutputPrinter(sys.stderr, prefix=False).write("", f"mb: {ended.message}\n".encode("utf-8", "replace"))
    return exit_of(ended, otherwise)


async def _print_to_end(client: Client, program: Program, outbox: Outbox) -> Ended:
    printers = {False: OutputPrinter(sys.stdout, prefix=False), True: OutputPrinter(sys.stderr, prefix=False)}
    async for part in client.live.run_program(program, outbox.parts()):
        if isinstance(part, Ended):
            return part
        await asyncio.to_thread(_print, part, printers, program.terminal is not None)
    raise UnavailableError("exec_cut", "the call to the program was cut; it has been ended", "run it again")


def _print(part: Printed, printers: dict[bool, OutputPrinter], has_terminal: bool) -> None:
    # A program with a terminal is given this one, with all that it can be told to do.
    if not has_terminal:
        printers[part.is_error].write("", part.payload)
        return
    payload = memoryview(part.payload)
    while payload:
        payload = payload[os.write(STDOUT, payload) :]


def _start_reader(outbox: Outbox, let_go: asyncio.Event, *, watches: bool) -> None:
    loop = asyncio.get_running_loop()
    keys = LetGo()

    def read() -> None:
        with suppress(BrokenPipeError, RuntimeError):
            while payload := _read_input():
                passed, is_leaving = keys.scan(payload) if watches else (payload, False)
                if passed:
                    outbox.write(passed)
                if is_leaving:
                    loop.call_soon_threadsafe(let_go.set)
            outbox.write(b"")

    # A read of a terminal or pipe cannot be called off: the thread ends with the process.
    threading.Thread(target=read, daemon=True).start()


def _read_input() -> bytes:
    try:
        return os.read(STDIN, READ_BYTES)
    except OSError:
        # Closed, a folder, or a terminal that was hung up: there is no more to come, and the program is told so.
        return b""


@contextmanager
def _signals_forwarded(
    outbox: Outbox, let_go: asyncio.Event, enter: Callable[[], None] | None, *, has_terminal: bool
) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    interrupts = 0

    def forward(number: signal.Signals) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts >= INTERRUPTS_MAX or (has_terminal and number in _OWN_WITH_TERMINAL):
            let_go.set()
        else:
            outbox.put(Signal(number))

    def resume() -> None:
        if enter is not None:
            enter()
        outbox.put(terminal_size())

    try:
        for number in FORWARDED:
            loop.add_signal_handler(number, forward, number)
        if has_terminal:
            loop.add_signal_handler(signal.SIGWINCH, lambda: outbox.put(terminal_size()))
            loop.add_signal_handler(signal.SIGCONT, resume)
        yield
    finally:
        for number in (*FORWARDED, signal.SIGWINCH, signal.SIGCONT):
            loop.remove_signal_handler(number)
