"""The terminal that a program in a sandbox is lent."""

import os
import pty
import termios

from mb.terminal import raw_terminal


def test_a_terminal_is_as_it_was_afterwards() -> None:
    """Whatever happens in between, line editing and echo come back."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with raw_terminal(slave):
        assert not termios.tcgetattr(slave)[3] & termios.ECHO
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_a_terminal_that_was_hung_up_is_let_go() -> None:
    """A closed window ends mb with its own exit code, not with an error about the terminal."""
    master, slave = pty.openpty()
    with raw_terminal(slave):
        os.close(master)
    os.close(slave)
