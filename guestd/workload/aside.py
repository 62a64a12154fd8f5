"""Work in a process of its own that outlives guestd: it has guestd's code and memory, and none of its descriptors."""

from __future__ import annotations

import fcntl
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# guestd opens fewer than a hundred files; the port above all must not stay open behind it.
DESCRIPTORS_MAX = 1024


def fork_aside(work: Callable[[], None], lock: int) -> None:
    """Runs `work` in a child, to which `lock` passes: it is held until the child ends."""
    pid = os.fork()
    if pid == 0:
        try:
            os.closerange(3, lock)
            os.closerange(lock + 1, DESCRIPTORS_MAX)
            os.setsid()
            work()
        except Exception as error:
            sys.stderr.write(f"bedplate: guestd: {error!r}\n")
        finally:
            os._exit(0)
    os.close(lock)


def reap_children() -> dict[int, int]:
    """The wait status of each child that has ended since the last call, by pid; they are reaped."""
    ended: dict[int, int] = {}
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    except ChildProcessError:
        pass
    return ended


def take_lock(path: str) -> int | None:
    """A descriptor that holds the lock at `path`, also in children that inherit it, or None while another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
