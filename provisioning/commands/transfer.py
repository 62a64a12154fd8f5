"""An image as one tar file, for carrying it to another host: written from the store, verified before it is put into one.

The tar holds the manifest first and then the image's files, nothing else; its name, order, owners and times are fixed.
"""

import io
import os
import tarfile
from pathlib import Path

from fleet.errors import ConflictError, InvalidSpecError
from provisioning.imagestore import image_path, put_image, staging_dir
from provisioning.manifest import (
    FILE_ROLES,
    MANIFEST_MAX_BYTES,
    MANIFEST_NAME,
    Manifest,
    decode_manifest,
    encode_manifest,
    image_digest,
)
from provisioning.verify import verify_image

COPY_BYTES = 1024 * 1024


def export_image(images_dir: Path, digest: str, target: Path) -> None:
    """Writes an image that was verified byte by byte to the new file `target`; what is there already is not replaced.

    Raises ConflictError `file_exists`.
    """
    folder = image_path(images_dir, digest)
    manifest = verify_image(folder, digest)
    partial = target.with_name(f".{target.name}.part")
    try:
        with tarfile.open(partial, "x", format=tarfile.USTAR_FORMAT) as tar:
            for name in (MANIFEST_NAME, *(manifest.files[role].path for role in FILE_ROLES)):
                member = tarfile.TarInfo(name)
                member.size = (folder / name).stat().st_size
                with (folder / name).open("rb") as stream:
                    tar.addfile(member, stream)
        # A link fails where a rename would replace.
        os.link(partial, target)
    except FileExistsError as error:
        message = f"{error.filename2 or error.filename} is there already"
        raise ConflictError("file_exists", message, "name another file, or remove that one") from error
    finally:
        partial.unlink(missing_ok=True)


def import_image(images_dir: Path, source: Path, expected: str | None = None) -> tuple[str, Manifest]:
    """Puts the image in a tar into the store once every byte has the digest its manifest says.

    Raises InvalidSpecError `image_file_invalid` for any other file, or when the digest is not `expected`.
    """
    try:
        with tarfile.open(source, "r:") as tar, staging_dir(images_dir) as staging:
            manifest = decode_manifest(_read_manifest(tar))
            digest = image_digest(encode_manifest(manifest))
            if expected not in (None, digest):
                raise _invalid(source, f"it holds {digest}, not {expected}")
            sizes = {file.path: file.size_bytes for file in manifest.files.values()}
            while member := tar.next():
                if not member.isreg() or sizes.pop(member.name, None) != member.size:
                    raise _invalid(source, f"{member.name[:80]!r} is not what the manifest says")
                _unpack(tar, member, staging / member.name)
            if sizes:
                raise _invalid(source, f"{min(sizes)} is not in it")
            (staging / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
            verify_image(staging, digest)
            return put_image(images_dir, staging, manifest), manifest
    except (tarfile.TarError, EOFError) as error:
        raise _invalid(source, "it is no uncompressed tar") from error


def _read_manifest(tar: tarfile.TarFile) -> bytes:
    member = tar.next()
    if member is None or member.name != MANIFEST_NAME or not member.isreg() or member.size > MANIFEST_MAX_BYTES:
        raise tarfile.ReadError
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    content = tar.extractfile(member) or io.BytesIO()
    with target.open("xb") as stream:
        while chunk := content.read(COPY_BYTES):
            stream.write(chunk)


def _invalid(source: Path, reason: str) -> InvalidSpecError:
    return InvalidSpecError("image_file_invalid", f"{source} cannot be imported: {reason}", "export the image again")
