"""Writes a `newc` cpio archive, the kernel's initramfs format, with nothing in it that differs from build to build. PURE.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# The kernel refuses paths that do not fit PATH_MAX; ours are short, a longer one is a mistake.
PATH_MAX_BYTES = 255
# The magic and 13 numbers of 8 digits.
HEADER_BYTES = 110
TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class CpioMember:
    """One entry: `mode` with its file type bits, `content` for files and symlinks, `device` (major, minor) for nodes."""

    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def write_cpio(members: Iterable[CpioMember], mtime_s: int) -> bytes:
    """The archive: members sorted by path (so parents come first), all owned by root, all of one time.

    Raises ValueError for a path that is absolute, too long or there twice.
    """
    ordered = sorted(members, key=lambda member: member.path)
    parts = []
    previous = ""
    for number, member in enumerate(ordered, start=1):
        if not 0 < len(member.path.encode()) <= PATH_MAX_BYTES or member.path.startswith("/"):
            raise ValueError(f"{member.path!r} cannot be a member's path")
        if member.path == previous:
            raise ValueError(f"{member.path!r} is there twice")
        previous = member.path
        parts.append(_encode(member, number, mtime_s))
    parts.append(_encode(CpioMember(TRAILER, 0), 0, 0))
    return b"".join(parts)


def _encode(member: CpioMember, number: int, mtime_s: int) -> bytes:
    name = member.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(member.mode) else 1
    major, minor = member.device
    fields = (number, member.mode, 0, 0, links, mtime_s, len(member.content), 0, 0, major, minor, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(header + name) + _padded(member.content)


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 4)


def read_cpio(archive: bytes) -> Iterator[tuple[str, tuple[bytes, bytes]]]:
    """Path, header and content of each member of an archive that write_cpio wrote."""
    offset = 0
    while True:
        header = archive[offset : offset + HEADER_BYTES]
        size, name_size = int(header[54:62], 16), int(header[94:102], 16)
        start = offset + HEADER_BYTES
        path = archive[start : start + name_size - 1].decode()
        if path == TRAILER:
            return
        content_start = start + name_size + -(HEADER_BYTES + name_size) % 4
        yield path, (header, archive[content_start : content_start + size])
        offset = content_start + size + -size % 4
