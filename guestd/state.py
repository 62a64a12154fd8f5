"""What must survive a restart of guestd, as files on the scratch disk. Only root reads below its folder.

    <folder>/boot               the boot that all of this is of
    <folder>/configuration      `configure` as received; from when it exists this guest is configured
    <folder>/failure            why this sandbox cannot go on
    <folder>/nudge              a FIFO: whoever changed something here writes a byte, and guestd looks
    <folder>/artifact{,.tar}    the packed artifact, and what it is
    <folder>/reserve/           room for what must be written at the end, on a disk that agents have filled
    <folder>/agents/<name>/     one agent's files (guestd.workload.files)

Nothing is fsynced: what the page cache holds survives the end of any process. A scratch disk may be used by another boot: that one
drops all of this first.
"""

from __future__ import annotations

import contextlib
import json
import os

from guestd.fault import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

# The smallest disk is 64 MiB. So many files leave as many inodes; together they hold the artifact of an ordinary change.
RESERVE_FILES, RESERVE_FILE_BYTES = 8, 1024 * 1024
# As much as waits at most: the bytes mean nothing.
NUDGE_BYTES = 64 * 1024


class State:
    """The folder with guestd's files; `is_new` when no guestd has run in this boot before."""

    def __init__(self, folder: str, boot_id: str) -> None:
        self.folder = folder
        self.nudge_path = f"{folder}/nudge"
        self.artifact_path = f"{folder}/artifact.tar"
        self.artifact_about_path = f"{folder}/artifact"
        self.is_new = _read_text(f"{folder}/boot") != boot_id
        if self.is_new:
            # Before anything is written: its room may be the last there is.
            _remove_tree(folder)
        os.makedirs(f"{folder}/agents", mode=0o700, exist_ok=True)
        os.chmod(folder, 0o700)
        if self.is_new:
            with open(f"{folder}/boot", "w", opener=_open_private) as stream:
                stream.write(boot_id)
        with contextlib.suppress(FileExistsError):
            os.mkfifo(self.nudge_path, 0o600)

    def agent_folder(self, name: str) -> str:
        """Where an agent's files are, once it is started."""
        return f"{self.folder}/agents/{name}"

    def load_configuration(self) -> dict[str, Any] | None:
        """`configure` as it was received, or None."""
        return load_json(f"{self.folder}/configuration")

    def put_configuration(self, fields: Mapping[str, Any]) -> None:
        """Remember `configure`, and set room aside before any agent can take it."""
        os.makedirs(f"{self.folder}/reserve", 0o700, exist_ok=True)
        for number in range(RESERVE_FILES):
            with open(f"{self.folder}/reserve/{number}", "wb", opener=_open_private) as stream:
                os.posix_fallocate(stream.fileno(), 0, RESERVE_FILE_BYTES)
        put_json(f"{self.folder}/configuration", fields)

    def load_failure(self) -> GuestFault | None:
        """The fault that ended this sandbox, or None."""
        found = load_json(f"{self.folder}/failure")
        return GuestFault(found["code"], found["message"]) if found else None

    def put_failure(self, fault: GuestFault) -> None:
        """Remember the first fault."""
        if self.load_failure() is None:
            put_json(f"{self.folder}/failure", {"code": fault.code, "message": fault.message})

    def release_reserve(self) -> None:
        """Now is when the room is needed: no agent runs any more. Safe to repeat."""
        for number in range(RESERVE_FILES):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.folder}/reserve/{number}")

    def open_nudges(self) -> int:
        """A descriptor that is readable after a nudge. It never ends: this side holds both ends."""
        return os.open(self.nudge_path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def _read_text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def _remove_tree(folder: str) -> None:
    """Not shutil's: importing that costs a boot more than this. Follows no symlink."""
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(f"{parent}/{name}")
        for name in folders:
            path = f"{parent}/{name}"
            if os.path.islink(path):
                os.unlink(path)
            else:
                os.rmdir(path)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(folder)


def load_json(path: str) -> dict[str, Any] | None:
    """The object in a file that put_json wrote, or None when there is none."""
    try:
        with open(path, "rb") as stream:
            found: dict[str, Any] = json.loads(stream.read())
    except FileNotFoundError:
        return None
    return found


def put_json(path: str, fields: Mapping[str, Any]) -> None:
    """Write an object at once or not at all."""
    temporary = f"{path}.new"
    with open(temporary, "w", opener=_open_private) as stream:
        json.dump(fields, stream)
    os.replace(temporary, path)


def nudge(descriptor: int) -> None:
    """Make guestd look; when as many nudges wait as fit, it will look anyway."""
    with contextlib.suppress(BlockingIOError):
        os.write(descriptor, b"\0")


def take_nudges(descriptor: int) -> bool:
    """Whether there were nudges; they are taken."""
    try:
        return bool(os.read(descriptor, NUDGE_BYTES))
    except BlockingIOError:
        return False


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
