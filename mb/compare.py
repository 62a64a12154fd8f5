"""What changed in one path, as lines: a unified diff in git's form, or why there is none. PURE but for reading the two tars."""

import difflib
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from fleet.model.units import KIB
from mb.artifact import Change, ChangeKind, read_content
from mb.tarread import Node, NodeKind

# Comparing takes quadratic time at worst, and nobody reads more than this.
TEXT_BYTES_MAX = 512 * KIB
LINES_MAX = 10_000
GIT_FOLDER = ".git"


@dataclass(frozen=True, slots=True)
class FileDiff:
    """One changed path: `lines` without line ends, `remark` where there is no text to compare."""

    path: str
    kind: ChangeKind
    insertions: int
    deletions: int
    remark: str
    lines: tuple[str, ...]


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
    old, new = _side(change.old, old_stream), _side(change.new, new_stream)
    if change.is_skipped:
        return FileDiff(change.path, change.kind, 0, 0, "socket, device or fifo: not carried", ())
    if _is_folder(change.old) or _is_folder(change.new):
        return FileDiff(change.path, change.kind, 0, 0, "folder", ())
    head = list(_render_head(change, old, new))
    if old.text is None or new.text is None:
        return FileDiff(change.path, change.kind, 0, 0, "binary or large", (*head, _binary_line(change)))
    body = list(_render_body(change, old.text, new.text))
    if not body and old.mode == new.mode:
        return FileDiff(change.path, change.kind, 0, 0, "permissions only", ())
    added = sum(line.startswith("+") for line in body[2:])
    removed = sum(line.startswith("-") for line in body[2:])
    return FileDiff(change.path, change.kind, added, removed, "", (*head, *body))


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


def _is_folder(node: Node | None) -> bool:
    return node is not None and node.kind is NodeKind.FOLDER
