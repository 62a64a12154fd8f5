"""Unpacks a source's tar into a folder, trusting nothing in it. hostd runs it in a process of its own (unpack).

Only folders, regular files and symlinks come out. A member lies in a folder that the tar itself made before, by that very path: so
no path leads through a symlink, and none leads out. The folder is never mounted or executed on the host, it only becomes an EROFS
image.
"""

import errno
import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from fleet.errors import HostFaultError, InvalidSpecError
from fleet.model.units import KIB, MIB

MEMBERS_MAX = 200_000
UNPACKED_BYTES_MAX = 2 * 1024 * MIB
PATH_BYTES_MAX = 4096
DEPTH_MAX = 64
# Contents are read in pieces of this size; a header that wants more at once (a pax header may claim gigabytes) is refused.
READ_BYTES_MAX = 64 * KIB

_TOP = PurePosixPath()
# What is the host's fault and not the sender's.
_HOST_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE})


def unpack_source(stream: BinaryIO, folder: Path) -> None:
    """Unpacks a tar, from the start of a file, into the empty `folder`.

    Raises InvalidSpecError `source_invalid` that names the member and its fault, HostFaultError `source_failed` for the host's.
    """
    folders = {_TOP}
    try:
        with tarfile.open(fileobj=cast(BinaryIO, _SmallReads(stream)), mode="r:") as tar:
            count = total = 0
            while (member := tar.next()) is not None:
                count, total = count + 1, total + member.size
                if count > MEMBERS_MAX or total > UNPACKED_BYTES_MAX:
                    raise _invalid(f"it has more than {MEMBERS_MAX} members or {UNPACKED_BYTES_MAX // MIB} MiB")
                _unpack_member(tar, member, folder, folders)
                # tarfile keeps every member for lookups that nobody makes here.
                tar.members.clear()  # type: ignore[attr-defined]  # documented, but not in the stubs
    except OSError as error:
        if error.errno in _HOST_ERRORS:
            raise HostFaultError("source_failed", f"{folder}: {error.strerror}", "free space on the host") from error
        raise _invalid(error.strerror or "it cannot be written") from error
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise _invalid(str(error)[:200]) from error


class _SmallReads:
    """A file of which no more than READ_BYTES_MAX are read at once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        if not 0 <= size <= READ_BYTES_MAX:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)

    def seek(self, offset: int) -> int:
        return self._stream.seek(offset)

    def tell(self) -> int:
        return self._stream.tell()


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, folders: set[PurePosixPath]) -> None:
    path = _check_path(member.name)
    if path == _TOP and member.isdir():
        return
    if path == _TOP or path.parent not in folders:
        raise _invalid(f"{_quote(member)} lies in no folder of the tar")
    if member.size < 0:
        raise _invalid(f"{_quote(member)} has a size below zero")
    target = folder / path
    if member.isdir():
        target.mkdir(0o755)
        folders.add(path)
    elif member.issym():
        target.symlink_to(member.linkname)
    elif member.isreg():
        _write_file(tar, member, target)
    else:
        raise _invalid(f"{_quote(member)} is no file, folder or symlink")


def _write_file(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    content = tar.extractfile(member)
    assert content is not None
    mode = 0o755 if member.mode & 0o111 else 0o644
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as stream:
        while chunk := content.read(READ_BYTES_MAX):
            stream.write(chunk)


def _check_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if not is_inside or len(name.encode()) > PATH_BYTES_MAX or len(path.parts) > DEPTH_MAX:
        raise _invalid(f"{name[:200]!r} is no path below the source")
    return path


def _quote(member: tarfile.TarInfo) -> str:
    return repr(member.name[:200])


def _invalid(message: str) -> InvalidSpecError:
    return InvalidSpecError("source_invalid", f"the source cannot be unpacked: {message}", "pack it with mb")
