"""Durable small files and folders: a write is whole or absent, also when the power fails in the middle."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fleet.errors import HostFaultError


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Within it, an OSError becomes HostFaultError `disk_failed` naming `path`."""
    try:
        yield
    except OSError as error:
        message = f"{path}: {error.strerror}"
        raise HostFaultError("disk_failed", message, "free space on the host and check its disk") from error


def write_durable(path: Path, content: bytes) -> None:
    """Replaces `path` with `content` in one step and waits until the disk has it; raises HostFaultError `disk_failed`."""
    temporary = path.with_name(f".{path.name}.new")
    with disk_faults(path):
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    sync_folder(path.parent)


def remove_durable(path: Path) -> None:
    """Removes `path` if it is there, and waits until the disk knows; raises HostFaultError `disk_failed`."""
    with disk_faults(path):
        path.unlink(missing_ok=True)
    sync_folder(path.parent)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file `path`; one that is not there is held by nobody."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


class Reserve:
    """Room that is set aside on a disk, for what must be written also when it is full."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self.is_held = path.exists() and path.stat().st_size == size_bytes

    def take(self) -> bool:
        """Sets the room aside, unless it is already or there is none."""
        if not self.is_held:
            try:
                with self._path.open("wb") as stream:
                    os.posix_fallocate(stream.fileno(), 0, self._size_bytes)
                self.is_held = True
            except OSError:
                self.release()
        return self.is_held

    def release(self) -> bool:
        """Gives the room up; whether there was any."""
        was_held, self.is_held = self.is_held, False
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        return was_held


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable (fsync(2): a file's own fsync does not cover its name)."""
    with disk_faults(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
