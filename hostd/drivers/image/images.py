"""Images on this host: what a tag points at, and that every byte is what the manifest says before a VM boots from it.

The layout is provisioning's: `sha256-<hex>/{manifest.json,vmlinuz,initramfs.img,root.erofs}` and `tags/<name>:<tag>`. The
digest of the manifest names the image, the manifest holds the digests of the files.
"""

import asyncio
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fleet.errors import HostFaultError
from fleet.model.host import HostImage
from fleet.model.ids import Digest, digest_hex, is_digest
from hostd.reconcile.state import BootFiles

MANIFEST_BYTES_MAX = 1024 * 1024
LINK_VERSION = 1
# A tag file holds one digest; more tags than this are a mistake in the folder, not a host's stock of images.
TAGS_MAX = 1000

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_CORRUPT_STEP = (
    "put the image on this host again (provisioning build, or copy its folder), then submit the sandbox again"
)

# What tells one version of a file from another without reading it: inode, size, and both times in ns. A flipped byte on the disk
# below the filesystem escapes it, a write through the filesystem does not; so a full read is also done at hostd's start.
_Stamp = tuple[int, int, int, int]


class ImageStore:
    """The images folder, read only. Digests are computed once for each state of a file, then remembered by its stamp."""

    def __init__(self, images_dir: Path) -> None:
        self._images_dir = images_dir
        self._verified: dict[Path, tuple[_Stamp, str]] = {}
        self._lock = asyncio.Lock()

    async def list_images(self) -> tuple[HostImage, ...]:
        """The tagged images whose every byte was verified, by name; broken ones are left out, ensure_image says why."""
        images = []
        for name, digest in sorted(_read_tags(self._images_dir).items()):
            try:
                await self.ensure_image(digest)
            except HostFaultError:
                continue
            images.append(HostImage(name, digest))
        return tuple(images)

    async def ensure_image(self, digest: Digest) -> BootFiles:
        """The image's files, verified; raises HostFaultError `image_missing` or `image_corrupt` naming the file."""
        async with self._lock:
            return await asyncio.to_thread(self._verify, digest)

    def _verify(self, digest: Digest) -> BootFiles:
        folder = self._images_dir / f"sha256-{digest_hex(digest)}"
        manifest = _load_manifest(folder, digest)
        paths = {role: self._verify_file(folder, manifest["files"][role]) for role in ("kernel", "initramfs", "root")}
        return BootFiles(digest, str(paths["kernel"]), str(paths["initramfs"]), str(paths["root"]), manifest["cmdline"])

    def _verify_file(self, folder: Path, entry: Any) -> Path:
        if not _FILE_NAME.fullmatch(str(entry["path"])):
            raise _corrupt(folder, "its manifest names a file outside of the image")
        path = folder / str(entry["path"])
        try:
            stamp = _stamp(path)
            known = self._verified.get(path)
            actual = known[1] if known and known[0] == stamp else _digest_file(path)
        except OSError as error:
            raise _corrupt(path, error.strerror or "it cannot be read") from error
        if actual != entry["digest"]:
            self._verified.pop(path, None)
            raise _corrupt(path, f"its digest is {actual}, the manifest says {entry['digest']}")
        self._verified[path] = (stamp, actual)
        return path


def _read_tags(images_dir: Path) -> dict[str, Digest]:
    try:
        paths = sorted((images_dir / "tags").iterdir())[:TAGS_MAX]
    except FileNotFoundError:
        return {}
    texts = {path.name: path.read_text().strip() for path in paths if not path.name.startswith(".")}
    return {name: Digest(text) for name, text in texts.items() if is_digest(text)}


def _load_manifest(folder: Path, digest: Digest) -> dict[str, Any]:
    try:
        with (folder / "manifest.json").open("rb") as stream:
            content = stream.read(MANIFEST_BYTES_MAX)
    except FileNotFoundError as error:
        raise HostFaultError("image_missing", f"image {digest} is not on this host", _CORRUPT_STEP) from error
    if "sha256:" + hashlib.sha256(content).hexdigest() != digest:
        raise _corrupt(folder / "manifest.json", f"it does not have the digest {digest}")
    manifest: dict[str, Any] = json.loads(content)
    if manifest["link_version"] != LINK_VERSION:
        message = f"image {digest} speaks guest link {manifest['link_version']}, this host {LINK_VERSION}"
        raise HostFaultError("image_unsupported", message, "use an image of this host's release")
    return manifest


def _digest_file(path: Path) -> str:
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _stamp(path: Path) -> _Stamp:
    status = path.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _corrupt(path: Path, message: str) -> HostFaultError:
    return HostFaultError("image_corrupt", f"{path}: {message}", _CORRUPT_STEP)
