"""Starts a program in the background with its log in a file, waits until it is ready, and ends it by pid."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import HostFaultError

# Programs are looked at this often while they start; none offers an event that says "ready" to someone outside.
LOOK_INTERVAL_S = 0.05
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
TAIL_CHARS = 1500


@dataclass(frozen=True, slots=True)
class Program:
    """A running program: its name, its process, and where it logs."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def stop(self) -> None:
        """Asks it to end, waits, and kills it after STOP_TIMEOUT_S."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends it as a crash would (SIGKILL)."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def log_tail(self) -> str:
        """The last words of its log."""
        return self.log.read_text("utf-8", "replace")[-TAIL_CHARS:]


def start_program(
    name: str, arguments: Sequence[str], log: Path, is_ready: Callable[[], bool], env: Mapping[str, str] | None = None
) -> Program:
    """Starts a program and returns when `is_ready`; raises HostFaultError `program_failed` with its last words otherwise."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env={**os.environ, **(env or {})}
        )
    program = Program(name, process, log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_ready():
        if process.poll() is not None:
            message = f"{name} ended with code {process.returncode}: {program.log_tail()}"
            raise HostFaultError("program_failed", message, f"see {log}")
        if time.monotonic() > deadline:
            program.stop()
            message = f"{name} was not ready after {START_TIMEOUT_S:.0f} s: {program.log_tail()}"
            raise HostFaultError("program_failed", message, f"see {log}")
        time.sleep(LOOK_INTERVAL_S)
    return program
