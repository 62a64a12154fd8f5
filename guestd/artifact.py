"""Packs what agents made of their sources as the tar of docs/guest-link.md: the same changes give the same bytes."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import tarfile

from guestd.changes import DELETED, Change, find_changes
from guestd.fault import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from guestd.configuration import Source

ARTIFACT_BYTES_MAX = 1024**3


def pack_artifact(sources: Sequence[Source], folder: str, target: str) -> dict[str, object]:
    """Writes the artifact to `target`; its `size`, `digest` and number of `changes`. `folder` is that of guestd.workspace.

    Raises GuestFault `artifact_too_large` or `artifact_failed`.
    """
    try:
        found = [
            [] if source.readonly else find_changes(f"{folder}/{index}/lower", f"{folder}/{index}/upper")
            for index, source in enumerate(sources)
        ]
        with open(target, "wb") as stream:
            measured = _Measured(stream)
            _write_tar(measured, sources, found, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise GuestFault("artifact_failed", "the sandbox's disk is too full to pack the changes") from error
        raise GuestFault("artifact_failed", f"the changes cannot be packed: {error.strerror or error}") from error
    return {"size": measured.size, "digest": measured.digest, "changes": sum(map(len, found))}


class _Measured:
    """A file that is written in order, with its size, its digest, and a limit."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hasher = hashlib.sha256()
        self.size = 0

    @property
    def digest(self) -> str:
        return "sha256:" + self._hasher.hexdigest()

    def tell(self) -> int:
        return self.size

    def write(self, content: bytes) -> int:
        self.size += len(content)
        if self.size > ARTIFACT_BYTES_MAX:
            raise _too_large()
        self._hasher.update(content)
        return self._stream.write(content)


def _write_tar(target: _Measured, sources: Sequence[Source], found: list[list[Change]], folder: str) -> None:
    entries = [
        {**source.about, "changes": [change.describe() for change in changes]}
        for source, changes in zip(sources, found, strict=True)
    ]
    content = json.dumps({"version": 1, "sources": entries}).encode()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        listing = tarfile.TarInfo("changes.json")
        listing.size = len(content)
        archive.addfile(listing, io.BytesIO(content))
        for index, changes in enumerate(found):
            for change in changes:
                if change.kind != DELETED and not change.is_skipped:
                    _add_member(archive, f"{index}/{change.path}", f"{folder}/{index}/upper/{change.path}")


def _add_member(archive: tarfile.TarFile, name: str, path: str) -> None:
    status = os.lstat(path)
    member = tarfile.TarInfo(name)
    member.mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    elif stat.S_ISLNK(status.st_mode):
        member.type = tarfile.SYMTYPE
        member.linkname = os.readlink(path)
        archive.addfile(member)
    else:
        member.size = status.st_size
        if status.st_size > ARTIFACT_BYTES_MAX:
            raise _too_large()
        with open(path, "rb") as stream:
            archive.addfile(member, stream)


def _too_large() -> GuestFault:
    return GuestFault("artifact_too_large", f"the changed files are more than {ARTIFACT_BYTES_MAX} bytes")
