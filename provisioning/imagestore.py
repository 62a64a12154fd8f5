"""Where images live on disk. Owns names and atomic writes, not what is inside an image.

    <images_dir>/sha256-<hex>/{manifest.json,vmlinuz,initramfs.img,root.erofs}
    <images_dir>/tags/<name>:<tag>     a digest and a newline
    <images_dir>/keys/<hex>            the digest of the image that this build key led to

Everything is world-readable: hostd and an unprivileged QEMU read it.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import BedplateError
from provisioning.manifest import FILE_ROLES, MANIFEST_NAME, Manifest, encode_manifest, image_digest, is_digest
from provisioning.verify import verify_image, verify_sizes

STAGING_PREFIX = ".staging-"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One image in the store and the tags that point at it; `problem` says why it cannot be used, if so."""

    digest: str
    name: str
    size_bytes: int
    tags: tuple[str, ...]
    problem: str


def image_path(images_dir: Path, digest: str) -> Path:
    """The folder of the image `digest`."""
    return images_dir / digest.replace(":", "-", 1)


@contextmanager
def sole_builder(folder: Path, leftover_prefix: str) -> Iterator[None]:
    """Holds the folder against other builders, waiting for one that is at work, and removes what a killed one left there.

    The wait is bounded: each step of a build has a time limit, and the kernel drops a dead builder's lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for leftover in folder.glob(f"{leftover_prefix}*"):
            shutil.rmtree(leftover)
        yield
    finally:
        os.close(handle)


@contextmanager
def staging_dir(images_dir: Path) -> Iterator[Path]:
    """A folder beside the images for writing one; it is gone afterwards unless put_image moved it."""
    images_dir.mkdir(parents=True, exist_ok=True)
    images_dir.chmod(0o755)
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=images_dir))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def put_image(images_dir: Path, staging: Path, manifest: Manifest) -> str:
    """Publishes a staged folder under its digest in one rename and returns the digest.

    An image of the same name that is whole is left alone, a broken one replaced.
    """
    content = encode_manifest(manifest)
    digest = image_digest(content)
    (staging / MANIFEST_NAME).write_bytes(content)
    for path in sorted(staging.iterdir()):
        path.chmod(0o644)
        _sync(path)
    staging.chmod(0o755)
    target = image_path(images_dir, digest)
    if target.exists():
        if _is_whole(target, digest):
            return digest
        shutil.rmtree(target)
    staging.rename(target)
    _sync(images_dir)
    return digest


def write_tag(images_dir: Path, tag: str, digest: str) -> None:
    """Points `tag` at an image, atomically."""
    _write_pointer(images_dir / "tags" / tag, digest)


def read_tag(images_dir: Path, tag: str) -> str | None:
    """The digest `tag` points at, or None."""
    return _read_pointer(images_dir / "tags" / tag)


def write_key(images_dir: Path, key: str, digest: str) -> None:
    """Remembers which image a build key led to."""
    _write_pointer(images_dir / "keys" / key, digest)


def find_built(images_dir: Path, key: str, *, full: bool) -> str | None:
    """The digest of a usable image built from exactly this key, or None. `full` reads every byte of it."""
    digest = _read_pointer(images_dir / "keys" / key)
    if digest is None or not _is_whole(image_path(images_dir, digest), digest, full=full):
        return None
    return digest


def list_images(images_dir: Path) -> list[StoredImage]:
    """Every image of the store, sorted by digest, with its tags; sizes are checked, content is not."""
    tags: dict[str, list[str]] = {}
    for path in sorted((images_dir / "tags").glob("*:*")):
        digest = _read_pointer(path)
        if digest is not None:
            tags.setdefault(digest, []).append(path.name)
    digests = [path.name.replace("-", ":", 1) for path in sorted(images_dir.glob("sha256-*"))]
    return [_describe(images_dir, digest, tuple(tags.get(digest, ()))) for digest in digests if is_digest(digest)]


def _describe(images_dir: Path, digest: str, tags: tuple[str, ...]) -> StoredImage:
    try:
        manifest = verify_sizes(image_path(images_dir, digest), digest)
    except BedplateError as error:
        return StoredImage(digest, "", 0, tags, error.message)
    size_bytes = sum(manifest.files[role].size_bytes for role in FILE_ROLES)
    return StoredImage(digest, manifest.name, size_bytes, tags, "")


def _is_whole(image_dir: Path, digest: str, *, full: bool = True) -> bool:
    try:
        (verify_image if full else verify_sizes)(image_dir, digest)
    except BedplateError:
        return False
    return True


def _read_pointer(path: Path) -> str | None:
    try:
        text = path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return text if is_digest(text) else None


def _write_pointer(path: Path, digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o755)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    with os.fdopen(handle, "w") as stream:
        stream.write(digest + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    Path(temporary).chmod(0o644)
    Path(temporary).replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
