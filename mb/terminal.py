"""This process's own terminal, lent to a program in a sandbox: raw while it runs, as it was afterwards."""

import os
import shutil
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from mb.program import Size

# What is typed to let go of a program that no longer answers, as with ssh: Enter, tilde, dot.
LET_GO = b"~."
_LINE_ENDS = b"\r\n"


@contextmanager
def raw_terminal(descriptor: int) -> Iterator[Callable[[], None]]:
    """The terminal passes every key on, unread and unechoed; restored at the end. Yields what makes it raw again after a stop."""
    before = termios.tcgetattr(descriptor)

    def enter() -> None:
        tty.setraw(descriptor, termios.TCSADRAIN)

    try:
        enter()
        yield enter
    finally:
        # A terminal that was hung up has nothing to restore.
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def terminal_size() -> Size:
    """Of the terminal that output goes to; of an ordinary one when there is none."""
    columns, rows = shutil.get_terminal_size((80, 24))
    return Size(columns, rows)


def is_terminal(descriptor: int) -> bool:
    """Whether a descriptor is a terminal; a closed one is none."""
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


class LetGo:
    """Watches what is typed for LET_GO at a line's beginning."""

    def __init__(self) -> None:
        self._typed = b""
        self._at_start = True

    def scan(self, payload: bytes) -> tuple[bytes, bool]:
        """What of the typed bytes goes to the program, and whether the user lets go of it. A lone tilde waits for the next key."""
        passed = bytearray()
        for byte in payload:
            key = bytes([byte])
            if self._typed:
                if key == LET_GO[1:]:
                    return bytes(passed), True
                # A second tilde stands for one, as with ssh.
                passed += b"~" if key == b"~" else b"~" + key
                self._typed, self._at_start = b"", key in _LINE_ENDS
            elif self._at_start and key == LET_GO[:1]:
                self._typed = key
            else:
                passed += key
                self._at_start = key in _LINE_ENDS
        return bytes(passed), False
