"""One program that an owner runs by hand: its streams within their windows, its end. Never blocks, keeps no output.

running -- main process ended --> ended -- output read to its end, or 2 s --> killed -- drained --> over
running -- client gone (HUP) --> ended or after 2 s --> killed --> over
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import time

from guestd.fault import clean_text
from guestd.workload.confine import AGENT
from guestd.workload.terminal import open_terminal, resize_terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from guestd.workload.spare import Spare

# As docs/guest-link.md has it: unacknowledged bytes each way.
WINDOW_BYTES = 256 * 1024
CHUNK_BYTES = 64 * 1024
# What may still hold the output when the main process has ended, or may tidy up after a HUP, has this long.
LINGER_S = 2.0
# A killed process leaves in milliseconds; after this long, what is left hangs in the kernel and is not waited for.
KILL_WAIT_S = 5.0
# A sentence of 300 characters and an exit code, as JSON.
REPORT_BYTES = 4096
# Ctrl-D, as an end of input is typed at a terminal.
END_OF_FILE = b"\x04"

STDOUT, STDERR = "stdout", "stderr"


class Program:
    """A spare child that has been told what to become. Times are of time.monotonic()."""

    def __init__(self, spare: Spare, request: Mapping[str, Any], terminal: tuple[int, int] | None) -> None:
        """Starts it; `terminal` is columns and rows, or None for pipes. Raises OSError or ValueError, the spare is gone then."""
        self.pid = spare.pid
        self.cgroup = spare.cgroup
        self.has_ended = False
        self.is_over = False
        self._report = spare.report
        self._stdin, self._streams = spare.stdin, {STDOUT: spare.stdout, STDERR: spare.stderr}
        self._slave = self._process = -1
        self._is_terminal = terminal is not None
        self._is_dry = False
        self._input = bytearray()
        self._is_input_ending = False
        self._received = self._taken = self._told_taken = 0
        self._sent = self._acked = 0
        self._next_stream = STDOUT
        self._kill_at_s = self._give_up_at_s = math.inf
        self._status: int | None = None
        try:
            self._process = os.pidfd_open(self.pid)
            path = self._open_terminal(terminal, is_agents=request["user"] == AGENT) if terminal else ""
            spare.begin({**request, "terminal": path})
        except (OSError, ValueError):
            os.close(spare.request)
            self.close()
            raise

    @property
    def next_at_s(self) -> float:
        """When something is due although nothing happens; infinite for never."""
        return self._kill_at_s if time.monotonic() >= self._give_up_at_s else min(self._kill_at_s, self._give_up_at_s)

    def watch(self, poll: select.poll, *, has_room: bool) -> None:
        """Register all that can make this program go on; output only while there is room for it."""
        if not self.has_ended:
            poll.register(self._process, select.POLLIN)
        if has_room and self._window():
            for descriptor in self._streams.values():
                poll.register(descriptor, select.POLLIN)
        if self._input:
            poll.register(self._stdin, select.POLLOUT)

    def take_input(self, content: bytes, *, is_end: bool) -> None:
        """More for its stdin; raises ValueError when that is more than its window."""
        self._received += len(content)
        if self._received - self._taken > WINDOW_BYTES:
            raise ValueError("input past its window")
        if self._stdin >= 0 and not self._is_input_ending:
            self._input += content
            self._is_input_ending = is_end
            if is_end and self._is_terminal:
                self._input += END_OF_FILE
        self._write_input()

    def acknowledge(self, count: int) -> None:
        """So many bytes of output have reached the client."""
        self._acked = min(max(self._acked, count), self._sent)

    def take_output(self) -> tuple[str, bytes] | None:
        """What may be sent next, from both streams in turn, or None for nothing now."""
        for _ in range(len(self._streams)):
            name = self._next_stream if self._next_stream in self._streams else next(iter(self._streams))
            self._next_stream = STDERR if name == STDOUT else STDOUT
            content = self._read(name)
            if content:
                self._sent += len(content)
                return name, content
        return None

    def take_input_ack(self) -> int | None:
        """How much input it has taken, when that is news."""
        self._write_input()
        if self._taken == self._told_taken:
            return None
        self._told_taken = self._taken
        return self._taken

    def resize(self, columns: int, rows: int) -> None:
        """Its terminal has another size; raises ValueError for one that cannot be."""
        if self._is_terminal and STDOUT in self._streams:
            resize_terminal(self._streams[STDOUT], columns, rows)

    def signal(self, number: int) -> None:
        """A signal to its process group, or to the one in its terminal's foreground."""
        if self.has_ended:
            return
        group = self.pid
        with contextlib.suppress(OSError):
            if self._is_terminal and STDOUT in self._streams:
                group = os.tcgetpgrp(self._streams[STDOUT]) or self.pid
            os.killpg(group, number)

    def hang_up(self) -> None:
        """Nobody listens any more: it is told so, and killed after a while."""
        self.cgroup.signal(signal.SIGHUP)
        self._close_streams()
        self._linger()

    def kill(self) -> None:
        """End it now."""
        self.cgroup.kill()
        self._kill_at_s = math.inf
        if math.isinf(self._give_up_at_s):
            self._give_up_at_s = time.monotonic() + KILL_WAIT_S

    def end(self, status: int) -> None:
        """Its main process has ended with this wait status."""
        self.has_ended, self._status = True, status
        os.close(self._process)
        self._process = -1
        # Held until here: a terminal without any other end reads as ended.
        self._close_slave()
        self._linger()

    def tend(self) -> None:
        """What is due now; sets `is_over`."""
        now_s = time.monotonic()
        is_drained = not self._streams
        if now_s >= self._kill_at_s or (self.has_ended and is_drained and math.isinf(self._give_up_at_s)):
            self.kill()
        # Killed, and yet its output goes on: some other program has been handed it.
        is_given_up = now_s >= self._give_up_at_s and self._is_dry
        self.is_over = self.has_ended and (is_drained or is_given_up)

    def describe_end(self) -> dict[str, object]:
        """The fields of `exec-ended`, without its id."""
        told = b""
        with contextlib.suppress(BlockingIOError):
            told = os.read(self._report, REPORT_BYTES)
        if told:
            found = json.loads(told)
            return {"exit_code": found["exit_code"], "signal": None, "message": clean_text(found["message"])}
        code = os.waitstatus_to_exitcode(self._status or 0)
        return {"exit_code": code if code >= 0 else None, "signal": -code if code < 0 else None, "message": ""}

    def close(self) -> None:
        """Let go of everything but the cgroup."""
        self._close_streams()
        self._close_slave()
        for descriptor in (self._report, self._process):
            if descriptor >= 0:
                os.close(descriptor)
        self._report = self._process = -1

    def _open_terminal(self, size: tuple[int, int], *, is_agents: bool) -> str:
        master, self._slave = open_terminal(is_agents=is_agents)
        self._close_streams()
        self._streams, self._stdin = {STDOUT: master}, os.dup(master)
        resize_terminal(master, *size)
        return os.ttyname(self._slave)

    def _window(self) -> int:
        return self._acked + WINDOW_BYTES - self._sent

    def _read(self, name: str) -> bytes:
        count = min(self._window(), CHUNK_BYTES)
        if count <= 0:
            return b""
        try:
            content = os.read(self._streams[name], count)
        except BlockingIOError:
            self._is_dry = True
            return b""
        except OSError:
            # EIO: a terminal whose programs are gone.
            content = b""
        self._is_dry = False
        if not content:
            os.close(self._streams.pop(name))
        return content

    def _write_input(self) -> None:
        try:
            while self._input:
                count = os.write(self._stdin, self._input)
                del self._input[:count]
        except BlockingIOError:
            pass
        except OSError:
            # Nobody reads it any more.
            self._close_input()
        # What is no input of the client's, the Ctrl-D, is not counted.
        self._taken = min(self._received, max(self._taken, self._received - len(self._input)))
        if self._is_input_ending and not self._input and not self._is_terminal:
            self._close_input()

    def _linger(self) -> None:
        if math.isinf(self._kill_at_s) and math.isinf(self._give_up_at_s):
            self._kill_at_s = time.monotonic() + LINGER_S

    def _close_input(self) -> None:
        self._input.clear()
        if self._stdin >= 0:
            os.close(self._stdin)
        self._stdin = -1

    def _close_slave(self) -> None:
        if self._slave >= 0:
            os.close(self._slave)
        self._slave = -1

    def _close_streams(self) -> None:
        self._close_input()
        while self._streams:
            os.close(self._streams.popitem()[1])
