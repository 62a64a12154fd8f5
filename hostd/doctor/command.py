"""Runs a program to its end, bounded in time and output. The doctor's only way to start one."""

import subprocess
from dataclasses import dataclass

COMMAND_TIMEOUT_S = 20.0
OUTPUT_CHARS_MAX = 2000


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: its code, None when it could not be run or hung; and the end of what it printed."""

    code: int | None
    output: str
    stdout: str = ""

    @property
    def first_line(self) -> str:
        """The first line of what it printed."""
        return next(iter(self.output.splitlines()), "")


def run(*arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Ended:
    """Runs a program, without a shell and without input."""
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return Ended(None, f"it was silent for {timeout_s:.0f} s")
    except OSError as error:
        return Ended(None, error.strerror or str(error))
    both = (done.stdout + done.stderr).strip()
    return Ended(done.returncode, both[-OUTPUT_CHARS_MAX:], done.stdout[:OUTPUT_CHARS_MAX])
