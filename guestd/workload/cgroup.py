"""One agent's cgroup (kernel document cgroup-v2): its limits, its processes, and their end."""

from __future__ import annotations

import contextlib
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestd.configuration import Agent

MIB = 1024 * 1024


class Cgroup:
    """A cgroup below one that hands on memory and pids."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create(self, agent: Agent) -> None:
        """The cgroup with the agent's limits; raises OSError."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path)
        self._write("memory.max", str(agent.memory_mib * MIB))
        self._write("memory.oom.group", "1")
        self._write("pids.max", str(agent.pids_max))
        # Absent in a kernel without swap.
        with contextlib.suppress(FileNotFoundError):
            self._write("memory.swap.max", "0")

    def enter(self) -> None:
        """Move this process in; only root can ever move it out."""
        self._write("cgroup.procs", "0")

    def signal(self, number: int) -> None:
        """Send a signal to every process in it."""
        for pid in self._read("cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)

    def kill(self) -> None:
        """End every process in it, also those being forked now."""
        with contextlib.suppress(FileNotFoundError):
            self._write("cgroup.kill", "1")

    def open_events(self) -> int:
        """A descriptor that polls POLLPRI when the first process has come or the last has gone."""
        return os.open(f"{self.path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)

    def remove(self) -> None:
        """Take the empty cgroup away; one that cannot be emptied stays."""
        try:
            os.rmdir(self.path)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT):
                raise

    def count_oom_kills(self) -> int:
        """How many of its processes were killed for want of memory."""
        return _count(self._read("memory.events"), "oom_kill")

    def _read(self, name: str) -> str:
        with open(f"{self.path}/{name}") as stream:
            return stream.read()

    def _write(self, name: str, text: str) -> None:
        # Not open(..., "w"): O_CREAT on a control file that does not exist is EACCES, not ENOENT.
        descriptor = os.open(f"{self.path}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def is_populated(events: int) -> bool:
    """Whether processes are in the cgroup of these events; the next change makes the descriptor ready again."""
    return _count(os.pread(events, 4096, 0).decode(), "populated") > 0


def _count(text: str, key: str) -> int:
    return sum(int(line.split()[1]) for line in text.splitlines() if line.split()[0] == key)
