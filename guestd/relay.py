"""Runs in a tmux window: shows an agent's terminal and sends keys and the window's size to its supervisor.

It runs as the user agent and is nothing but a viewer; its frames are FRAME: kind, then the length of the keys that follow and 0, or
columns and rows.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import termios
from _socket import AF_UNIX, SOCK_STREAM, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

FRAME = struct.Struct(">BHH")
KEYS, SIZE = 1, 2
# As much as a terminal's line discipline holds; a paste comes in several frames.
KEYS_BYTES_MAX = 4096
# What a pipe or a socket's buffer has at once.
READ_BYTES = 64 * 1024


def main(path: str) -> None:
    """Until the session or the window ends."""
    supervisor = socket(AF_UNIX, SOCK_STREAM)
    supervisor.connect(path)
    _make_raw(0)
    changes, change = os.pipe()
    os.set_blocking(change, False)
    signal.set_wakeup_fd(change)
    signal.signal(signal.SIGWINCH, _ignore)
    _send_size(supervisor)
    poll = select.poll()
    for descriptor in (0, supervisor.fileno(), changes):
        poll.register(descriptor, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if changes in ready:
            os.read(changes, READ_BYTES)
            _send_size(supervisor)
        if supervisor.fileno() in ready:
            content = supervisor.recv(READ_BYTES)
            if not content:
                return
            _write_all(content)
        if 0 in ready:
            keys = os.read(0, KEYS_BYTES_MAX)
            if not keys:
                return
            supervisor.sendall(FRAME.pack(KEYS, len(keys), 0) + keys)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """The wakeup descriptor has it."""


def _send_size(supervisor: socket) -> None:
    columns, rows = os.get_terminal_size(0)
    supervisor.sendall(FRAME.pack(SIZE, columns, rows))


def _make_raw(terminal: int) -> None:
    """Every key goes to the agent's terminal, which echoes; only newlines are made whole here, where the agent's are bare."""
    attributes = termios.tcgetattr(terminal)
    attributes[0] &= ~(termios.IXON | termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP | termios.BRKINT)
    attributes[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)


def _write_all(content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(1, left) :]
