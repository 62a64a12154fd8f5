"""Unpacks a source's tar into a folder, trusting nothing in it. Synchronous: run it in a thread.

Only folders, regular files and symlinks come out; every path stays below the folder; nothing is written through a symlink. The
folder is never mounted or executed on the host, it only becomes an EROFS image.
"""

import os
import tarfile
from pathlib import Path, PurePosixPath

from fleet.errors import InvalidSpecError
from fleet.model.units import MIB

MEMBERS_MAX = 200_000
UNPACKED_BYTES_MAX = 2 * 1024 * MIB
PATH_BYTES_MAX = 4096
DEPTH_MAX = 64
COPY_BYTES = MIB


def unpack_source(tar_path: Path, folder: Path) -> None:
    """Unpacks into the empty `folder`; raises InvalidSpecError `source_invalid` that names the member and its fault."""
    total = 0
    try:
        with tarfile.open(tar_path, "r:") as tar:
            for count, member in enumerate(tar, start=1):
                total += member.size
                if count > MEMBERS_MAX or total > UNPACKED_BYTES_MAX:
                    raise _invalid(f"it has more than {MEMBERS_MAX} members or {UNPACKED_BYTES_MAX // MIB} MiB")
                _unpack_member(tar, member, folder)
    except (tarfile.TarError, OSError, UnicodeError) as error:
        raise _invalid(str(error)) from error


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    target = folder / _check_path(member.name)
    # Members of a canonical tar come after their folders, so a parent that is a symlink or missing is an attack or a fault.
    parent = target.parent
    if parent != folder and (parent.is_symlink() or not parent.is_dir()):
        raise _invalid(f"{member.name!r} lies in no folder of the tar")
    mode = 0o755 if member.mode & 0o111 else 0o644
    if member.isdir():
        if target != folder:
            target.mkdir(0o755)
    elif member.issym():
        target.symlink_to(member.linkname)
    elif member.isreg():
        _write_file(tar, member, target, mode)
    else:
        raise _invalid(f"{member.name!r} is no file, folder or symlink")


def _write_file(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, mode: int) -> None:
    content = tar.extractfile(member)
    assert content is not None
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as stream:
        while chunk := content.read(COPY_BYTES):
            stream.write(chunk)


def _check_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if not is_inside or len(name.encode()) > PATH_BYTES_MAX or len(path.parts) > DEPTH_MAX:
        raise _invalid(f"{name[:200]!r} is no path below the source")
    # `folder / "a" / "b"` resolves through "a": _unpack_member checks the direct parent, and each parent was checked when made.
    return path


def _invalid(message: str) -> InvalidSpecError:
    return InvalidSpecError("source_invalid", f"the source cannot be unpacked: {message}", "pack it with mb")
