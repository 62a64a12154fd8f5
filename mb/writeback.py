"""Writes what a sandbox changed into a folder here. The artifact is hostile and so is what it wants to be written.

    look (what is there now) -> plan_writeback (PURE: write, delete, leave or conflict) -> apply

Nothing is written before every conflict is known. Every path is walked folder by folder from an open descriptor and never through
a symlink; files are made beside their place and renamed into it; of a mode only `x` is kept; a symlink is made only when it
stays inside the folder.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from fleet.errors import HostFaultError
from fleet.model.units import MIB
from mb.artifact import Change
from mb.compare import is_git_path
from mb.tarread import Node, NodeKind

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_OPEN_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
COPY_BYTES = MIB


class Here(StrEnum):
    """What is at a path now, compared with what went into the sandbox and what came out."""

    ABSENT = "absent"
    OLD = "as it went in"
    NEW = "as it came out"
    FOLDER = "a folder"
    OTHER = "changed here meanwhile"
    BLOCKED = "below a symlink or a file"


class Action(StrEnum):
    """What is done about one change."""

    WRITE = "write"
    DELETE = "delete"
    NOTHING = "nothing"
    LEAVE = "leave"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user allows: to overwrite what was changed here, to delete, to touch .git."""

    force: bool = False
    delete: bool = False
    with_git: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One change with what is done about it, and why when that is not simply done."""

    change: Change
    action: Action
    reason: str = ""


def plan_writeback(changes: Sequence[Change], here: Sequence[Here], choices: Choices) -> list[Step]:
    """What to do about each change, given what is there. PURE."""
    return [_plan_one(change, found, choices) for change, found in zip(changes, here, strict=True)]


def left_alone(steps: Iterable[Step]) -> dict[str, int]:
    """How many paths are left as they are, by reason. PURE."""
    left: dict[str, int] = {}
    for step in steps:
        if step.action is Action.LEAVE:
            left[step.reason] = left.get(step.reason, 0) + 1
    return left


def look(folder: Path, changes: Sequence[Change], old: BinaryIO, new: BinaryIO) -> list[Here]:
    """What is at each change's path below `folder`, which need not exist."""
    if not folder.is_dir():
        return [Here.ABSENT] * len(changes)
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return [_look_at(root, change, old, new) for change in changes]
    finally:
        os.close(root)


def apply_writeback(folder: Path, steps: Sequence[Step], new: BinaryIO) -> None:
    """Does the steps: deletes from the deepest up, then writes from the top down; raises HostFaultError `write_failed`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for step in reversed(steps):
                if step.action is Action.DELETE:
                    _delete(root, step.change.path)
            for step in steps:
                if step.action is Action.WRITE and step.change.new is not None:
                    _write(root, step.change.path, step.change.new, new)
        finally:
            os.close(root)
    except OSError as error:
        message = f"{folder}: {error.filename or ''} {error.strerror}"
        raise HostFaultError("write_failed", message, "mend it and run mb get again") from error


def _plan_one(change: Change, here: Here, choices: Choices) -> Step:
    reason = _reason_to_leave(change, choices)
    if reason:
        return Step(change, Action.LEAVE, reason)
    if here is Here.BLOCKED:
        return Step(change, Action.CONFLICT, here.value)
    if change.new is None:
        return _plan_deletion(change, here, choices)
    if change.new.kind is NodeKind.FOLDER:
        return _plan_folder(change, here)
    return _plan_node(change, here, choices)


def _reason_to_leave(change: Change, choices: Choices) -> str:
    if is_git_path(change.path) and not choices.with_git:
        return "git would run what is in it; --with-git writes it"
    if change.is_skipped:
        return "a socket, device or fifo"
    if change.new is not None and change.new.kind is NodeKind.SYMLINK:
        return "" if _stays_inside(change.path, change.new.link) else "a symlink that leads outside"
    return ""


def _plan_node(change: Change, here: Here, choices: Choices) -> Step:
    if here is Here.NEW:
        return Step(change, Action.NOTHING)
    if here is Here.FOLDER or (here is Here.OTHER and not choices.force):
        return Step(change, Action.CONFLICT, here.value)
    return Step(change, Action.WRITE)


def _plan_deletion(change: Change, here: Here, choices: Choices) -> Step:
    if here is Here.ABSENT:
        return Step(change, Action.NOTHING)
    if not choices.delete:
        return Step(change, Action.LEAVE, "deleted there; --delete deletes it here")
    is_own = here is Here.OTHER and not choices.force
    is_in_place_of_folder = here is Here.FOLDER and (change.old is None or change.old.kind is not NodeKind.FOLDER)
    if is_own or is_in_place_of_folder:
        return Step(change, Action.CONFLICT, here.value)
    return Step(change, Action.DELETE)


def _plan_folder(change: Change, here: Here) -> Step:
    if here is Here.FOLDER:
        return Step(change, Action.NOTHING)
    if here is Here.ABSENT:
        return Step(change, Action.WRITE)
    return Step(change, Action.CONFLICT, "no folder here")


def _stays_inside(path: str, link: str) -> bool:
    # `..` counts from the folder that it is written in. Behind a name it would count from wherever that name leads, and with
    # symlinks that each stay inside a chain of them leaves.
    parts = [part for part in link.split("/") if part not in ("", ".")]
    ups = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    return not link.startswith("/") and ups <= path.count("/") and ".." not in parts[ups:]


def _look_at(root: int, change: Change, old: BinaryIO, new: BinaryIO) -> Here:
    try:
        parent, name = _open_parent(root, change.path, make=False)
    except FileNotFoundError:
        return Here.ABSENT
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return Here.BLOCKED
        raise HostFaultError("unreadable", f"{change.path}: {error.strerror}", "make it readable") from error
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            return Here.FOLDER
        if _equals(parent, name, mode, change.new, new):
            return Here.NEW
        return Here.OLD if _equals(parent, name, mode, change.old, old) else Here.OTHER
    except FileNotFoundError:
        return Here.ABSENT
    finally:
        os.close(parent)


def _equals(parent: int, name: str, mode: int, node: Node | None, content: BinaryIO) -> bool:
    if node is None:
        return False
    if stat.S_ISLNK(mode):
        return node.kind is NodeKind.SYMLINK and os.readlink(name, dir_fd=parent) == node.link
    if not stat.S_ISREG(mode) or node.kind is not NodeKind.FILE or bool(mode & 0o111) is not node.is_executable:
        return False
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=parent)
    with os.fdopen(descriptor, "rb") as stream:
        if os.fstat(descriptor).st_size != node.size_bytes:
            return False
        content.seek(node.offset)
        left = node.size_bytes
        while left:
            size = min(left, COPY_BYTES)
            if stream.read(size) != content.read(size):
                return False
            left -= size
    return True


def _open_parent(root: int, path: str, *, make: bool) -> tuple[int, str]:
    """A descriptor of the folder that `path` lies in, to be closed, and the last name; fails at a symlink on the way."""
    *folders, name = path.split("/")
    current = os.dup(root)
    try:
        for folder in folders:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(folder, 0o755, dir_fd=current)
            following = os.open(folder, _OPEN_FOLDER, dir_fd=current)
            os.close(current)
            current = following
    except OSError:
        os.close(current)
        raise
    return current, name


def _delete(root: int, path: str) -> None:
    parent, name = _open_parent(root, path, make=False)
    try:
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            # What else lies in it was not the sandbox's to delete.
            with suppress(OSError):
                os.rmdir(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)
    finally:
        os.close(parent)


def _write(root: int, path: str, node: Node, content: BinaryIO) -> None:
    parent, name = _open_parent(root, path, make=True)
    try:
        if node.kind is NodeKind.FOLDER:
            with suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=parent)
            return
        temporary = f".bedplate-{secrets.token_hex(8)}"
        try:
            _make(parent, temporary, node, content)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent)
            raise
    finally:
        os.close(parent)


def _make(parent: int, name: str, node: Node, content: BinaryIO) -> None:
    if node.kind is NodeKind.SYMLINK:
        os.symlink(node.link, name, dir_fd=parent)
        return
    descriptor = os.open(name, _OPEN_NEW, 0o755 if node.is_executable else 0o644, dir_fd=parent)
    with os.fdopen(descriptor, "wb") as stream:
        content.seek(node.offset)
        left = node.size_bytes
        while left:
            piece = content.read(min(left, COPY_BYTES))
            if not piece:
                raise OSError(errno.EIO, "the artifact is shorter than it was", name)
            stream.write(piece)
            left -= len(piece)
