"""A person at a terminal: `mb` on a pseudo-terminal, with keys to press and a screen to read."""

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.e2e.operate import PATIENCE_S

READ_BYTES = 65536


class Terminal:
    """One program on a terminal; `screen` is all that it has printed."""

    def __init__(self, process: "subprocess.Popen[bytes]", master: int) -> None:
        self._process = process
        self._master = master
        self.screen = ""

    def press(self, keys: str) -> None:
        """Types."""
        os.write(self._master, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        """Another size of the window; the kernel tells the program with SIGWINCH."""
        _set_size(self._master, columns, rows)

    def until(self, text: str) -> None:
        """Returns when `text` was printed after all that earlier calls have waited for; fails after PATIENCE_S or at the end."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.screen:
            assert time.monotonic() < deadline, f"{text!r} was not printed: {self.screen!r}"
            assert self._read(), f"ended without {text!r}: {self.screen!r}"
        self.screen = self.screen.partition(text)[2]

    def wait(self) -> int:
        """Its exit code."""
        while self._read():
            pass
        return self._process.wait(PATIENCE_S)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], PATIENCE_S)
        assert ready, f"nothing was printed for {PATIENCE_S} s: {self.screen!r}"
        with contextlib.suppress(OSError):  # Linux reports the end of the other side as EIO
            content = os.read(self._master, READ_BYTES)
            self.screen += content.decode("utf-8", "replace")
            return bool(content)
        return False


@contextmanager
def on_terminal(
    command: Sequence[str], env: Mapping[str, str], columns: int = 80, rows: int = 24
) -> Iterator[Terminal]:
    """Runs a program on a terminal of that size; what still runs at the end is ended."""
    master, slave = os.openpty()
    _set_size(master, columns, rows)
    # util-linux's setsid makes the terminal its program's controlling one: what Ctrl-C needs.
    arguments = ["setsid", "--ctty", *command]
    process = subprocess.Popen(arguments, env={**env, "TERM": "xterm"}, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE_S)
        os.close(master)


def _set_size(descriptor: int, columns: int, rows: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
