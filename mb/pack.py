"""Packs a folder into its canonical tar: the same tree gives the same bytes on every machine, and so the same digest.

Members are sorted with folders before what is in them; owner 0, time 0; mode 755 for folders and what anyone may execute, 644 else;
format pax. Symlinks are kept as they are. Everything goes in, `.git` too, but for what `.bedplateignore` lists.
"""

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fleet.errors import InvalidSpecError
from fleet.model.admission import SOURCE_BYTES_MAX
from fleet.model.ids import Digest
from fleet.model.units import MIB
from mb.ignore import Ignored, load_ignored

# What a host unpacks (hostd.drivers.image.untar): more is refused there, so it is refused before it is sent.
MEMBERS_MAX = 200_000
PATH_BYTES_MAX = 4096
DEPTH_MAX = 64
COPY_BYTES = MIB
# A tar ends with two empty blocks.
BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)

_IGNORE = "list what the sandbox does not need in .bedplateignore"


@dataclass(frozen=True, slots=True)
class Packed:
    """A folder as a tar: its digest, its size, and how many members it has."""

    digest: Digest
    size_bytes: int
    members: int


def pack_folder(folder: Path, stream: BinaryIO | None = None) -> Packed:
    """Packs `folder` into `stream`, or only measures it; raises InvalidSpecError `source_invalid` that names the path."""
    if not _is_folder(folder):
        raise _invalid(f"{folder} is no folder", "name a folder that exists")
    sink = _Sink(stream)
    members = 0
    try:
        for entry, path in _walk(folder, load_ignored(folder)):
            members += 1
            if members > MEMBERS_MAX:
                raise _invalid(f"{folder} has more than {MEMBERS_MAX} files", _IGNORE)
            _add(sink, entry, path)
        sink.write(END)
    except (OSError, ValueError) as error:
        raise _invalid(f"{folder}: {error}", "make it readable") from error
    return Packed(Digest("sha256:" + sink.hasher.hexdigest()), sink.size_bytes, members)


class _Sink:
    """Hashes and counts what is written, and passes it on."""

    def __init__(self, stream: BinaryIO | None) -> None:
        self.hasher = hashlib.sha256()
        self.size_bytes = 0
        self._stream = stream

    def write(self, content: bytes) -> int:
        self.hasher.update(content)
        self.size_bytes += len(content)
        if self.size_bytes > SOURCE_BYTES_MAX:
            raise _invalid(f"it is larger than {SOURCE_BYTES_MAX // MIB} MiB", _IGNORE)
        if self._stream is not None:
            self._stream.write(content)
        return len(content)


def _walk(
    folder: Path, is_ignored: Ignored, prefix: str = "", depth: int = 1
) -> Iterator[tuple[os.DirEntry[str], str]]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    for entry in entries:
        path = prefix + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_ignored(path, is_folder):
            continue
        _check_path(entry.path, path, depth)
        yield entry, path
        if is_folder:
            yield from _walk(Path(entry.path), is_ignored, path + "/", depth + 1)


def _check_path(shown: str, path: str, depth: int) -> None:
    try:
        size_bytes = len(path.encode())
    except UnicodeEncodeError as error:
        raise _invalid(f"{os.fsencode(shown)!r} is not named in UTF-8", "rename it") from error
    if size_bytes > PATH_BYTES_MAX or depth > DEPTH_MAX:
        raise _invalid(f"{shown} is too long or more than {DEPTH_MAX} folders deep", _IGNORE)


def _add(sink: _Sink, entry: os.DirEntry[str], path: str) -> None:
    found = entry.stat(follow_symlinks=False)
    member = tarfile.TarInfo(path)
    member.mode = 0o755 if found.st_mode & 0o111 else 0o644
    if stat.S_ISREG(found.st_mode):
        _add_file(sink, member, entry.path)
    elif stat.S_ISDIR(found.st_mode):
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        _add_header(sink, member)
    elif stat.S_ISLNK(found.st_mode):
        member.type, member.mode = tarfile.SYMTYPE, 0o777
        member.linkname = os.readlink(entry.path)  # noqa: PTH115 (a Path would normalise the target)
        _check_path(entry.path, member.linkname, 1)
        _add_header(sink, member)
    else:
        raise _invalid(f"{entry.path} is no file, folder or symlink", _IGNORE)


def _add_file(sink: _Sink, member: tarfile.TarInfo, path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as stream:
        member.size = left = os.fstat(descriptor).st_size
        _add_header(sink, member)
        while left:
            content = stream.read(min(left, COPY_BYTES))
            if not content:
                raise _invalid(f"{path} became shorter while it was packed", "try again")
            sink.write(content)
            left -= len(content)
    sink.write(bytes(-member.size % BLOCK_BYTES))


def _add_header(sink: _Sink, member: tarfile.TarInfo) -> None:
    sink.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except ValueError:  # a NUL in it
        return False


def _invalid(message: str, next_step: str) -> InvalidSpecError:
    return InvalidSpecError("source_invalid", message, next_step)
