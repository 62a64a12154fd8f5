"""The manifest that names an image: its files with digests, its packages, its command line. PURE: bytes in, bytes out.

hostd reads the same format with code of its own: programs meet in data, not in imports.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from fleet.errors import InvalidSpecError

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"
# A manifest of 1,000 packages is 40 KiB; what is much larger is no manifest of ours.
MANIFEST_MAX_BYTES = 1024 * 1024
FILE_ROLES = ("kernel", "initramfs", "root")

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file of an image: its name in the image's folder, its sha256 and its size."""

    path: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything needed to boot an image and to check it. `files` has exactly the roles of FILE_ROLES."""

    name: str
    architecture: str
    link_version: int
    cmdline: str
    files: dict[str, ImageFile]
    packages: tuple[tuple[str, str], ...]


def encode_manifest(manifest: Manifest) -> bytes:
    """The one byte string for this manifest: sorted keys, no spaces, a newline at the end."""
    table = {
        "version": MANIFEST_VERSION,
        "name": manifest.name,
        "architecture": manifest.architecture,
        "link_version": manifest.link_version,
        "cmdline": manifest.cmdline,
        "files": {
            role: {"path": file.path, "digest": file.digest, "size_bytes": file.size_bytes}
            for role, file in manifest.files.items()
        },
        "packages": [list(package) for package in manifest.packages],
    }
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def decode_manifest(content: bytes) -> Manifest:
    """Parses a manifest strictly. Raises InvalidSpecError for anything encode_manifest would not have written."""
    if len(content) > MANIFEST_MAX_BYTES:
        raise _invalid(f"it is larger than {MANIFEST_MAX_BYTES} bytes")
    try:
        manifest = _parse(json.loads(content))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _invalid(repr(error)) from error
    if encode_manifest(manifest) != content:
        raise _invalid("it is not in canonical form")
    return manifest


def image_digest(content: bytes) -> str:
    """The digest that names the image whose manifest has these bytes."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def is_digest(text: str) -> bool:
    """True for `sha256:` and 64 lowercase hex digits."""
    return _DIGEST.fullmatch(text) is not None


def _parse(table: dict[str, Any]) -> Manifest:
    if table["version"] != MANIFEST_VERSION:
        raise ValueError(f"version {table['version']!r} is not {MANIFEST_VERSION}")
    if set(table["files"]) != set(FILE_ROLES):
        raise ValueError(f"files {sorted(table['files'])!r} are not {sorted(FILE_ROLES)!r}")
    return Manifest(
        name=str(table["name"]),
        architecture=str(table["architecture"]),
        link_version=int(table["link_version"]),
        cmdline=str(table["cmdline"]),
        files={role: _parse_file(table["files"][role]) for role in FILE_ROLES},
        packages=tuple((str(name), str(version)) for name, version in table["packages"]),
    )


def _parse_file(table: dict[str, Any]) -> ImageFile:
    file = ImageFile(path=str(table["path"]), digest=str(table["digest"]), size_bytes=int(table["size_bytes"]))
    if not _FILE_NAME.fullmatch(file.path) or not is_digest(file.digest) or file.size_bytes < 0:
        raise ValueError(f"{table!r} describes no file of an image")
    return file


def _invalid(reason: str) -> InvalidSpecError:
    return InvalidSpecError("manifest_invalid", f"the manifest cannot be used: {reason}", "build the image again")
