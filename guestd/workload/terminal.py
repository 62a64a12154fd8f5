"""Pseudo-terminals (pty(7), ioctl_tty(2)): one end for guestd or a supervisor, the other for a program."""

from __future__ import annotations

import fcntl
import os
import struct

from guestd import AGENT_ID

# What the kernel's struct winsize holds; far more than any screen.
CELLS_MAX = 65535

# What a terminal is that tmux shows.
SESSION_TERM = "tmux-256color"

TIOCSCTTY = 0x540E
_TIOCSWINSZ = 0x5414
_WINSIZE = struct.Struct("=HHHH")


def open_terminal(*, is_agents: bool) -> tuple[int, int]:
    """The master and the slave of a new terminal, which belongs to agents or to root; raises OSError."""
    master, slave = os.openpty()
    if is_agents:
        os.fchown(slave, AGENT_ID, -1)
    os.set_blocking(master, False)
    return master, slave


def resize_terminal(master: int, columns: int, rows: int) -> None:
    """Give it a size; whoever runs in its foreground hears of a change (SIGWINCH). Raises ValueError for a size that cannot be."""
    if not 0 <= columns <= CELLS_MAX or not 0 <= rows <= CELLS_MAX:
        raise ValueError(f"a terminal of {columns} x {rows}")
    fcntl.ioctl(master, _TIOCSWINSZ, _WINSIZE.pack(rows, columns, 0, 0))
