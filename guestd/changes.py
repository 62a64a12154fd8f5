"""The exact difference between a source and what agents made of it, read from the upper tree of its overlay.

A path is changed when its type, its permissions or its content differ: a file that was only touched, or written again with the same
content, is not. Owners and times are no part of it: all belongs to one user, and a source has no times. Source of the overlay's
marks: the kernel's document overlayfs.
"""

from __future__ import annotations

import os
import stat

from guestd.fault import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# As docs/guest-link.md bounds the artifact; receivers refuse more.
CHANGES_MAX = 200_000
# One folder of an upper tree holds at most so many changed paths, and as many of the source that were only touched.
NAMES_MAX = 2 * CHANGES_MAX
# Receivers refuse a tar with a deeper member; the index of the source is one folder more.
DEPTH_MAX = 79
READ_BYTES = 1024 * 1024

ADDED = "added"
MODIFIED = "modified"
DELETED = "deleted"

_OPAQUE = "trusted.overlay.opaque"


class Change:
    """One path below a source, as it is named in `folder/upper`; `is_skipped` for what no tar should carry out of a guest."""

    __slots__ = ("is_skipped", "kind", "path")

    def __init__(self, path: str, kind: str, *, is_skipped: bool = False) -> None:
        self.path = path
        self.kind = kind
        self.is_skipped = is_skipped

    def describe(self) -> dict[str, object]:
        """Its entry in changes.json; bytes of a name that are no UTF-8 are escaped, and such a path is always skipped."""
        name = os.fsencode(self.path).decode("utf-8", "backslashreplace")
        entry: dict[str, object] = {"path": name, "kind": self.kind}
        return {**entry, "skipped": True} if self.is_skipped else entry


def find_changes(lower: str, upper: str, limit: int = CHANGES_MAX) -> list[Change]:
    """Every changed path, sorted, each on its own also below a deleted folder.

    Raises GuestFault `artifact_too_large` past `limit`, `artifact_too_deep`, or OSError.
    """
    changes: list[Change] = []
    for change in _walk(lower, upper):
        changes.append(change)
        if len(changes) > limit:
            raise GuestFault("artifact_too_large", f"more than {limit} paths were changed")
        if change.path.count("/") >= DEPTH_MAX:
            raise GuestFault("artifact_too_deep", f"a path is deeper than {DEPTH_MAX} folders: {change.path}")
    return sorted(changes, key=lambda change: change.path)


def _walk(lower: str, upper: str) -> Iterator[Change]:
    # Not recursive: an agent may nest folders deeper than Python's stack. The source's side is only followed through real folders:
    # a symlink there would lead out of it.
    folders = [("", True)]
    while folders:
        folder, is_in_lower = folders.pop()
        names = _list_names(_join(upper, folder))
        for name in names:
            path = _join(folder, name)
            now = os.lstat(_join(upper, path))
            before = _lstat(_join(lower, path)) if is_in_lower else None
            yield from _compare(lower, upper, path, before, now)
            if stat.S_ISDIR(now.st_mode):
                folders.append((path, before is not None and stat.S_ISDIR(before.st_mode)))
        if is_in_lower and _is_opaque(_join(upper, folder)):
            yield from _deleted_below(lower, folder, frozenset(names))


def _list_names(folder: str) -> list[str]:
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > NAMES_MAX:
                raise GuestFault("artifact_too_large", f"a folder holds more than {NAMES_MAX} paths")
    return names


def _compare(lower: str, upper: str, path: str, before: os.stat_result | None, now: os.stat_result) -> Iterator[Change]:
    is_whiteout = stat.S_ISCHR(now.st_mode) and now.st_rdev == 0
    if is_whiteout:
        if before is not None:
            yield from _deleted_tree(lower, path, before.st_mode)
    elif before is None:
        yield _make_change(upper, path, ADDED, now.st_mode)
    else:
        if not _is_same(_join(lower, path), before, _join(upper, path), now):
            yield _make_change(upper, path, MODIFIED, now.st_mode)
        if stat.S_ISDIR(before.st_mode) and not stat.S_ISDIR(now.st_mode):
            yield from _deleted_below(lower, path, frozenset())


def _make_change(upper: str, path: str, kind: str, mode: int) -> Change:
    texts = [path]
    if stat.S_ISLNK(mode):
        texts.append(os.readlink(_join(upper, path)))
    is_plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
    return Change(path, kind, is_skipped=not is_plain or not all(map(_is_text, texts)))


def _is_text(name: str) -> bool:
    """Whether a name is UTF-8: Python has the bytes that are not as lone surrogates."""
    return not any("\udc80" <= char <= "\udcff" for char in name)


def _is_same(lower: str, before: os.stat_result, upper: str, now: os.stat_result) -> bool:
    if before.st_mode != now.st_mode:
        return False
    if stat.S_ISREG(now.st_mode):
        return before.st_size == now.st_size and _has_same_content(lower, upper)
    if stat.S_ISLNK(now.st_mode):
        return os.readlink(lower) == os.readlink(upper)
    return stat.S_ISDIR(now.st_mode)


def _has_same_content(lower: str, upper: str) -> bool:
    with open(lower, "rb", buffering=0) as one, open(upper, "rb", buffering=0) as other:
        while content := one.read(READ_BYTES):
            if content != other.read(len(content)):
                return False
    return True


def _deleted_below(lower: str, folder: str, kept: frozenset[str]) -> Iterator[Change]:
    """Everything that the source has below `folder`, except below the names `kept`."""
    for name in os.listdir(_join(lower, folder)):
        if name not in kept:
            path = _join(folder, name)
            yield from _deleted_tree(lower, path, os.lstat(_join(lower, path)).st_mode)


def _deleted_tree(lower: str, path: str, mode: int) -> Iterator[Change]:
    yield Change(path, DELETED)
    if stat.S_ISDIR(mode):
        # A source is at most 64 folders deep: hostd.drivers.image refuses more.
        yield from _deleted_below(lower, path, frozenset())


def _is_opaque(folder: str) -> bool:
    try:
        return os.getxattr(folder, _OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        # No such attribute, which is the usual case, or a filesystem without any.
        return False


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name
