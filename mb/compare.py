"""What changed in one path, as lines: a unified diff in git's form, or why there is none. PURE but for reading the two tars."""

import difflib
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from fleet.model.units import KIB, MIB
from mb.artifact import Change, ChangeKind, read_content
from mb.gitpatch import render_binary, render_index
from mb.tarread import Node, NodeKind

# Comparing takes quadratic time at worst, and nobody reads more than this.
TEXT_BYTES_MAX = 512 * KIB
LINES_MAX = 10_000
# What is written out of one file that is no text; larger ones are brought home by mb get.
BINARY_BYTES_MAX = 16 * MIB
GIT_FOLDER = ".git"


@dataclass(frozen=True, slots=True)
class FileDiff:
    """One changed path: `lines` without line ends, `remark` where there is no text to compare.

    `patch` is what `git apply` takes where that is more than people read; `is_left_out` says that there is none.
    """

    path: str
    kind: ChangeKind
    insertions: int
    deletions: int
    remark: str
    lines: tuple[str, ...]
    patch: tuple[str, ...] = ()
    is_left_out: bool = False


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a comparison; `text` is None for what is no text."""

    mode: str
    text: str | None


_ABSENT = _Side("", "")


def is_git_path(path: str) -> bool:
    """Whether git would take `path` as part of its own state, and run what is in it."""
    return any(part.lower().rstrip(". ") == GIT_FOLDER for part in path.split("/"))


def compare(change: Change, old_stream: BinaryIO, new_stream: BinaryIO) -> FileDiff:
    """The difference that `change` makes."""
    if change.is_skipped:
        return FileDiff(change.path, change.kind, 0, 0, "socket, device or fifo: not carried", ())
    # git knows no folders: one that became a file is a new file, and so on.
    change = replace(change, old=_no_folder(change.old), new=_no_folder(change.new))
    if change.old is None and change.new is None:
        return FileDiff(change.path, change.kind, 0, 0, "folder", ())
    if change.old and change.new and _is_symlink(change.old) is not _is_symlink(change.new):
        return _compare_apart(change, old_stream, new_stream)
    old, new = _side(change.old, old_stream), _side(change.new, new_stream)
    head = list(_render_head(change, old, new))
    if old.text is None or new.text is None:
        patch = tuple(_render_patch(change, head, old_stream, new_stream))
        shown = (*head, _binary_line(change))
        return FileDiff(change.path, change.kind, 0, 0, "binary or large", shown, patch, is_left_out=not patch)
    body = list(_render_body(change, old.text, new.text))
    if not body and old.mode == new.mode:
        return FileDiff(change.path, change.kind, 0, 0, "permissions only", ())
    added = sum(line.startswith("+") for line in body[2:])
    removed = sum(line.startswith("-") for line in body[2:])
    return FileDiff(change.path, change.kind, added, removed, "", (*head, *body))


def _compare_apart(change: Change, old_stream: BinaryIO, new_stream: BinaryIO) -> FileDiff:
    """A file that became a symlink, or the other way round: it goes, and another comes, as git has it."""
    gone = compare(replace(change, kind=ChangeKind.DELETED, new=None), old_stream, new_stream)
    come = compare(replace(change, kind=ChangeKind.ADDED, old=None), old_stream, new_stream)
    return FileDiff(
        change.path,
        change.kind,
        come.insertions,
        gone.deletions,
        "another kind",
        gone.lines + come.lines,
        (gone.patch or gone.lines) + (come.patch or come.lines),
        is_left_out=gone.is_left_out or come.is_left_out,
    )


def _render_patch(change: Change, head: list[str], old_stream: BinaryIO, new_stream: BinaryIO) -> Iterator[str]:
    nodes = [node for node in (change.old, change.new) if node]
    if any(node.size_bytes > BINARY_BYTES_MAX for node in nodes):
        return
    old = read_content(old_stream, change.old, BINARY_BYTES_MAX) if change.old else None
    new = read_content(new_stream, change.new, BINARY_BYTES_MAX) if change.new else None
    modes = {"100755" if node.is_executable else "100644" for node in nodes}
    yield from head
    yield render_index(old, new, modes.pop() if len(nodes) == 2 and len(modes) == 1 else "")
    yield from render_binary(new)


def quote_path(path: str) -> str:
    """`path` as git writes it: in quotes and with octal escapes when it holds anything but printable characters."""
    if path.isprintable() and '"' not in path and "\\" not in path:
        return path
    pieces = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in path.encode())
    return '"' + "".join(pieces) + '"'


def _side(node: Node | None, stream: BinaryIO) -> _Side:
    if node is None:
        return _ABSENT
    if node.kind is NodeKind.SYMLINK:
        return _Side("120000", node.link)
    mode = "100755" if node.is_executable else "100644"
    if node.size_bytes > TEXT_BYTES_MAX:
        return _Side(mode, None)
    content = read_content(stream, node, TEXT_BYTES_MAX)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return _Side(mode, None)
    return _Side(mode, None if "\0" in text or text.count("\n") > LINES_MAX else text)


def _render_head(change: Change, old: _Side, new: _Side) -> Iterator[str]:
    yield f"diff --git {_name('a', change.path)} {_name('b', change.path)}"
    if not old.mode:
        yield f"new file mode {new.mode}"
    elif not new.mode:
        yield f"deleted file mode {old.mode}"
    elif old.mode != new.mode:
        yield f"old mode {old.mode}"
        yield f"new mode {new.mode}"


def _render_body(change: Change, old: str, new: str) -> Iterator[str]:
    from_name = _name("a", change.path) if change.old else "/dev/null"
    to_name = _name("b", change.path) if change.new else "/dev/null"
    lines = difflib.unified_diff(_split(old), _split(new), from_name, to_name, lineterm="")
    for index, line in enumerate(lines):
        text = line if index < 2 else line.removesuffix("\n")
        yield text
        if index >= 2 and not line.startswith("@@") and not line.endswith("\n"):
            yield "\\ No newline at end of file"


def _split(text: str) -> list[str]:
    # Only \n ends a line: str.splitlines would also split at form feeds and at Unicode's line separators.
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _binary_line(change: Change) -> str:
    from_name = _name("a", change.path) if change.old else "/dev/null"
    to_name = _name("b", change.path) if change.new else "/dev/null"
    return f"Binary files {from_name} and {to_name} differ"


def _name(side: str, path: str) -> str:
    return quote_path(posixpath.join(side, path))


def _no_folder(node: Node | None) -> Node | None:
    return None if node is not None and node.kind is NodeKind.FOLDER else node


def _is_symlink(node: Node) -> bool:
    return node.kind is NodeKind.SYMLINK
