"""Images on this host: what a tag points at, and that every byte is what the manifest says before a VM boots from it.

The layout is provisioning's: `sha256-<hex>/{manifest.json,vmlinuz,initramfs.img,root.erofs}` and `tags/<name>:<tag>`. The
digest of the manifest names the image, the manifest holds the digests of the files. The time of `used/<hex>` is when a VM was
last started from an image: all that hostd writes there.
"""

import asyncio
import errno
import hashlib
import json
import re
import stat
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from fleet.errors import HostFaultError
from fleet.model.host import UNTAGGED, HostImage
from fleet.model.ids import Digest, digest_hex, is_digest
from hostd.reconcile.state import BootFiles
from hostd.reconcile.words import LINK_VERSION

MANIFEST_BYTES_MAX = 1024 * 1024
# A tag file holds one digest; more tags than this are a mistake in the folder, not a host's stock of images.
TAGS_MAX = 1000
TAG_BYTES_MAX = 100

_ROLES = ("kernel", "initramfs", "root")
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_CORRUPT_STEP = (
    "put the image on this host again (provisioning build, or copy its folder), then submit the sandbox again"
)

# What tells one version of a file from another without reading it: inode, size, and both times in ns. A flipped byte on the disk
# below the filesystem escapes it, a write through the filesystem does not; so a full read is also done at hostd's start.
_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What booting needs of a manifest: the command line, and name and digest of the file of each role."""

    cmdline: str
    files: dict[str, tuple[str, str]]


log = structlog.get_logger()


class ImageStore:
    """The images folder, of which only the notes of use are written.

    Digests are computed once for each state of a file, then remembered by its stamp.
    """

    def __init__(self, images_dir: Path) -> None:
        self._images_dir = images_dir
        self._verified: dict[Path, tuple[_Stamp, str]] = {}
        self._lock = asyncio.Lock()
        # What was last said of each tag that cannot be used, so that it is said once.
        self._refused: dict[str, str] = {}

    async def list_images(self, named: Set[Digest] = frozenset()) -> tuple[HostImage, ...]:
        """The images whose every byte was verified: the tagged, by name, then those `named` that no tag points at, without a name.

        Broken ones are left out, ensure_image says why.
        """
        tags = _read_tags(self._images_dir)
        untagged = ((UNTAGGED, digest) for digest in sorted(named - set(tags.values())))
        images = []
        for name, digest in (*sorted(tags.items()), *untagged):
            try:
                await self.check_image(digest)
            except HostFaultError as error:
                if self._refused.get(name or digest) != error.message:
                    self._refused[name or digest] = error.message
                    log.warning("image.refused", image=name or digest, code=error.code, error=error.message)
                continue
            self._refused.pop(name or digest, None)
            images.append(HostImage(name, digest))
        return tuple(images)

    async def ensure_image(self, digest: Digest) -> BootFiles:
        """The image's files, verified, for a VM that is about to start, which is noted for the store's garbage collection.

        Raises HostFaultError `image_missing` or `image_corrupt` naming the file.
        """
        async with self._lock:
            boot = await asyncio.to_thread(self._verify, digest)
            await asyncio.to_thread(self._note_use, digest)
            return boot

    async def check_image(self, digest: Digest) -> None:
        """Verifies an image as ensure_image does, for nobody's use."""
        async with self._lock:
            await asyncio.to_thread(self._verify, digest)

    def _note_use(self, digest: Digest) -> None:
        """Touches `used/<hex>`. A store that cannot be written still boots VMs: only its garbage collection knows less."""
        path = self._images_dir / "used" / digest_hex(digest)
        try:
            path.parent.mkdir(mode=0o755, exist_ok=True)
            path.touch(0o644)
        except OSError as error:
            log.warning("image.use_unnoted", image=digest, error=error.strerror)

    def _verify(self, digest: Digest) -> BootFiles:
        if not is_digest(digest):
            raise HostFaultError("image_missing", f"{digest[:80]!r} is no digest of an image", _CORRUPT_STEP)
        folder = self._images_dir / f"sha256-{digest_hex(digest)}"
        manifest = _load_manifest(folder, digest)
        paths = {role: str(self._verify_file(folder, *manifest.files[role])) for role in _ROLES}
        return BootFiles(digest, paths["kernel"], paths["initramfs"], paths["root"], manifest.cmdline)

    def _verify_file(self, folder: Path, name: str, expected: str) -> Path:
        path = folder / name
        try:
            stamp = _stamp(path)
            known = self._verified.get(path)
            actual = known[1] if known and known[0] == stamp else _digest_file(path)
        except OSError as error:
            raise _corrupt(path, error.strerror or "it cannot be read") from error
        if actual != expected:
            self._verified.pop(path, None)
            raise _corrupt(path, f"its digest is {actual}, the manifest says {expected}")
        self._verified[path] = (stamp, actual)
        return path


def _read_tags(images_dir: Path) -> dict[str, Digest]:
    try:
        paths = sorted((images_dir / "tags").iterdir())[:TAGS_MAX]
    except FileNotFoundError:
        return {}
    texts = {path.name: _read_tag(path) for path in paths if not path.name.startswith(".")}
    return {name: Digest(text) for name, text in texts.items() if is_digest(text)}


def _read_tag(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(TAG_BYTES_MAX).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _load_manifest(folder: Path, digest: Digest) -> _Manifest:
    path = folder / "manifest.json"
    try:
        with path.open("rb") as stream:
            content = stream.read(MANIFEST_BYTES_MAX)
    except FileNotFoundError as error:
        raise HostFaultError("image_missing", f"image {digest} is not on this host", _CORRUPT_STEP) from error
    except OSError as error:
        raise _corrupt(path, error.strerror or "it cannot be read") from error
    if "sha256:" + hashlib.sha256(content).hexdigest() != digest:
        raise _corrupt(path, f"it does not have the digest {digest}")
    try:
        return _parse_manifest(json.loads(content), digest)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _corrupt(path, f"it is no manifest of this release: {str(error)[:80]}") from error


def _parse_manifest(table: Any, digest: Digest) -> _Manifest:
    if table["link_version"] != LINK_VERSION:
        message = f"image {digest} speaks guest link {str(table['link_version'])[:20]}, this host {LINK_VERSION}"
        raise HostFaultError("image_unsupported", message, "use an image of this host's release")
    files = {role: (str(table["files"][role]["path"]), str(table["files"][role]["digest"])) for role in _ROLES}
    if not all(_FILE_NAME.fullmatch(name) for name, _ in files.values()):
        raise ValueError("it names a file outside of the image")
    return _Manifest(str(table["cmdline"]), files)


def _digest_file(path: Path) -> str:
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _stamp(path: Path) -> _Stamp:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _corrupt(path: Path, message: str) -> HostFaultError:
    return HostFaultError("image_corrupt", f"{path}: {message}", _CORRUPT_STEP)
