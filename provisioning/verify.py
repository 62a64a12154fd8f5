"""Checks an image's folder against its manifest, and its manifest against its name."""

import hashlib
from pathlib import Path

from fleet.errors import HostFaultError, NotFoundError
from provisioning.manifest import MANIFEST_NAME, ImageFile, Manifest, decode_manifest, image_digest


def verify_image(image_dir: Path, expected_digest: str | None = None) -> Manifest:
    """Promises that every byte of the image is what its manifest says, and the manifest what `expected_digest` says.

    Raises NotFoundError, InvalidSpecError for an unreadable manifest, HostFaultError `image_corrupt` for a difference.
    """
    manifest = verify_sizes(image_dir, expected_digest)
    for file in manifest.files.values():
        if digest_file(image_dir / file.path) != file.digest:
            raise _corrupt(f"{image_dir / file.path} does not have the digest {file.digest}")
    return manifest


def verify_sizes(image_dir: Path, expected_digest: str | None = None) -> Manifest:
    """The quick check: manifest, presence and sizes; raises as verify_image does."""
    path = image_dir / MANIFEST_NAME
    if not path.is_file():
        raise NotFoundError("image_not_found", f"there is no manifest {path}", "build the image")
    content = path.read_bytes()
    if expected_digest is not None and image_digest(content) != expected_digest:
        raise _corrupt(f"{path} does not have the digest {expected_digest}")
    manifest = decode_manifest(content)
    for file in manifest.files.values():
        _check_size(image_dir / file.path, file)
    return manifest


def digest_file(path: Path) -> str:
    """The sha256 of a file's content, read in pieces."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _check_size(path: Path, file: ImageFile) -> None:
    if path.is_symlink() or not path.is_file():
        raise _corrupt(f"{path} is missing or no regular file")
    if path.stat().st_size != file.size_bytes:
        raise _corrupt(f"{path} has {path.stat().st_size} bytes, not {file.size_bytes}")


def _corrupt(message: str) -> HostFaultError:
    return HostFaultError("image_corrupt", message, "remove the image's folder and build it again")
