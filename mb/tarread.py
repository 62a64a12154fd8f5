"""Reads the headers of a tar that may be hostile: plain ustar and pax, every size bounded before it is believed.

Python's own reader follows whatever a header says; this one knows regular files, folders and symlinks, and takes `path`, `linkpath`
and nothing else from pax records. Source: POSIX.1-2017, pax, "ustar Interchange Format".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

from fleet.errors import InvalidSpecError

BLOCK_BYTES = 512
MEMBERS_MAX = 400_000
# A path and a link target of 4 KiB each, and some times.
PAX_BYTES_MAX = 16 * 1024
PATH_BYTES_MAX = 4096
DEPTH_MAX = 80

_EMPTY = bytes(BLOCK_BYTES)


class NodeKind(StrEnum):
    """What a member is."""

    FILE = "file"
    FOLDER = "folder"
    SYMLINK = "symlink"


_KINDS = {b"0": NodeKind.FILE, b"\0": NodeKind.FILE, b"2": NodeKind.SYMLINK, b"5": NodeKind.FOLDER}
_PAX, _PAX_GLOBAL = b"x", b"g"


@dataclass(frozen=True, slots=True)
class Node:
    """One member: a clean relative path, and where its content lies in the tar. Of its mode only `x` is kept."""

    path: str
    kind: NodeKind
    is_executable: bool
    link: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    kind: bytes
    mode: int
    link: str
    size_bytes: int


def read_nodes(stream: BinaryIO, size_bytes: int) -> Iterator[Node]:
    """Every member of the tar of `size_bytes` in `stream`; raises InvalidSpecError `tar_invalid` at the first fault."""
    position, records, count = 0, {}, 0  # type: int, dict[str, str], int
    while (block := _read_block(stream, position)) != _EMPTY:
        header = _parse_header(block)
        content, position = position + BLOCK_BYTES, position + BLOCK_BYTES + _round_up(header.size_bytes)
        count += 1
        if position > size_bytes or count > MEMBERS_MAX:
            raise tar_invalid("it is cut off, or has too many members")
        if header.kind in (_PAX, _PAX_GLOBAL):
            found = _parse_pax(_read_pax(stream, content, header.size_bytes))
            records = found if header.kind == _PAX else records
            continue
        yield _to_node(header, records, content)
        records = {}


def check_path(path: str) -> str:
    """`path`, when it is relative, normalised and below its root; raises InvalidSpecError `tar_invalid` if not."""
    parts = path.split("/")
    is_clean = all(part not in ("", ".", "..") for part in parts) and "\0" not in path
    if not is_clean or len(parts) > DEPTH_MAX or len(path.encode("utf-8", "replace")) > PATH_BYTES_MAX:
        raise tar_invalid(f"{path[:100]!r} is no path below its root")
    return path


def tar_invalid(message: str) -> InvalidSpecError:
    """The error of a tar that is not what it should be."""
    return InvalidSpecError("tar_invalid", f"this tar is not trusted: {message}", "do not use it; see mb status")


def _to_node(header: _Header, records: dict[str, str], offset: int) -> Node:
    kind = _KINDS.get(header.kind)
    path = _check_text(records.get("path", header.name))
    if kind is None:
        raise tar_invalid(f"{path[:100]!r} is no file, folder or symlink")
    if kind is not NodeKind.FILE and header.size_bytes:
        raise tar_invalid(f"{path[:100]!r} is no file and has content")
    path = check_path(path.removesuffix("/") if kind is NodeKind.FOLDER else path)
    link = _check_text(records.get("linkpath", header.link)) if kind is NodeKind.SYMLINK else ""
    if kind is NodeKind.SYMLINK and (not link or "\0" in link or len(link.encode("utf-8", "replace")) > PATH_BYTES_MAX):
        raise tar_invalid(f"{path[:100]!r} has no usable target")
    return Node(path, kind, bool(header.mode & 0o111), link, offset, header.size_bytes)


def _parse_header(block: bytes) -> _Header:
    unsigned = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    if _parse_octal(block[148:156]) != unsigned or block[257:262] != b"ustar":
        raise tar_invalid("a header is damaged")
    name, prefix = _parse_text(block[0:100]), _parse_text(block[345:500])
    return _Header(
        name=f"{prefix}/{name}" if prefix else name,
        kind=block[156:157],
        mode=_parse_octal(block[100:108]),
        link=_parse_text(block[157:257]),
        size_bytes=_parse_octal(block[124:136]),
    )


def _parse_octal(field: bytes) -> int:
    text = field.strip(b" \0")
    if not text:
        return 0
    if not all(char in b"01234567" for char in text):
        raise tar_invalid("a number in a header is no octal number")
    return int(text, 8)


def _parse_text(field: bytes) -> str:
    # Where a pax record says the name, this one may end within a character.
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _check_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise tar_invalid("a name is not UTF-8") from error
    return text


def _parse_pax(content: bytes) -> dict[str, str]:
    """The records `length key=value\\n` that are used; a `size` that differs from the header's would desynchronise readers."""
    records: dict[str, str] = {}
    while content:
        length_text, space, _ = content.partition(b" ")
        if not space or not length_text.isdigit() or len(length_text) > 6 or not 0 < int(length_text) <= len(content):
            raise tar_invalid("a pax record is damaged")
        record, content = content[len(length_text) + 1 : int(length_text)], content[int(length_text) :]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise tar_invalid("a pax record is damaged")
        if key == b"size" or key.startswith(b"GNU.sparse"):
            raise tar_invalid("a pax record changes a size")
        if key in (b"path", b"linkpath"):
            records[key.decode("ascii")] = _decode(value)
    return records


def _decode(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise tar_invalid("a name is not UTF-8") from error


def _read_block(stream: BinaryIO, position: int) -> bytes:
    stream.seek(position)
    block = stream.read(BLOCK_BYTES)
    if len(block) != BLOCK_BYTES:
        raise tar_invalid("it is cut off")
    return block


def _read_pax(stream: BinaryIO, position: int, size_bytes: int) -> bytes:
    if size_bytes > PAX_BYTES_MAX:
        raise tar_invalid("a pax header is too large")
    stream.seek(position)
    return stream.read(size_bytes)


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
