"""The cgroup of an agent or a program (kernel document cgroup-v2): its limits, its processes, and their end."""

from __future__ import annotations

import contextlib
import errno
import os

MIB = 1024 * 1024
# Made by provisioning/guest/init; the supervisors are in it too.
GUESTD = "guestd"


class Cgroup:
    """A cgroup below one that hands on memory and pids."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create(self, *, pids_max: int, memory_mib: int = 0) -> None:
        """The cgroup with its limits, memory unlimited at 0; raises OSError."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path)
        self._write("pids.max", str(pids_max))
        if memory_mib:
            self._write("memory.max", str(memory_mib * MIB))
            self._write("memory.oom.group", "1")
            # Absent in a kernel without swap.
            with contextlib.suppress(FileNotFoundError):
                self._write("memory.swap.max", "0")

    def enter(self) -> None:
        """Move this process in; only root can ever move it out."""
        self._write("cgroup.procs", "0")

    def signal(self, number: int) -> None:
        """Send a signal to every process in it."""
        with contextlib.suppress(FileNotFoundError):
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

    def remove(self) -> bool:
        """Take the empty cgroup away; False while processes keep it."""
        try:
            os.rmdir(self.path)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT):
                raise
            return error.errno == errno.ENOENT
        return True

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


def end_all(cgroups: str) -> None:
    """Kill everything that was started for an owner: all below `cgroups` but guestd's own."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(cgroups):
            if os.path.isdir(f"{cgroups}/{name}") and name != GUESTD:
                Cgroup(f"{cgroups}/{name}").kill()


def is_populated(events: int) -> bool:
    """Whether processes are in the cgroup of these events; the next change makes the descriptor ready again."""
    return _count(os.pread(events, 4096, 0).decode(), "populated") > 0


def _count(text: str, key: str) -> int:
    return sum(int(line.split()[1]) for line in text.splitlines() if line.split()[0] == key)
