"""`ls`, `inspect`, `verify`, `import`, `export`, `rm` and `gc`: what is done with images that exist."""

import argparse
import json
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from fleet.errors import ConflictError, InvalidSpecError, NotFoundError
from fleet.model.units import parse_duration_s, render_bytes
from provisioning.commands.garbage import Candidate, choose_garbage
from provisioning.commands.transfer import export_image, import_image
from provisioning.imagestore import (
    STAGING_PREFIX,
    StoredImage,
    image_path,
    list_images,
    read_tag,
    sole_builder,
    write_tag,
)
from provisioning.manifest import MANIFEST_NAME, is_digest
from provisioning.verify import verify_image, verify_sizes

_TAG = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}:[A-Za-z0-9_][A-Za-z0-9._-]{0,62}")
# What a name without a tag means, as in a jcard.
LATEST = "latest"
# What a table shows of a digest: enough to tell images apart and to name one.
SHORT_CHARS = len("sha256:") + 12


def ls(options: argparse.Namespace) -> int:
    """Lists the images of the store."""
    images = list_images(options.images)
    if options.json:
        print(
            json.dumps(
                [{**asdict(one), "last_used_s": last_used(options.images, one.digest)} for one in images], indent=2
            )
        )
        return 0
    print(f"{'IMAGE':<20} {'SIZE':>10}  {'LAST USED':<16}  TAGS")
    for one in images:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(last_used(options.images, one.digest)))
        size = "broken" if one.problem else render_bytes(one.size_bytes)
        print(f"{one.digest[:SHORT_CHARS]:<20} {size:>10}  {used:<16}  {' '.join(one.tags) or '-'}")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Shows everything about one image."""
    digest = resolve(options.images, options.image)
    manifest = verify_sizes(image_path(options.images, digest), digest)
    if options.json:
        print(json.dumps({"digest": digest, "tags": tags_of(options.images, digest), **asdict(manifest)}, indent=2))
        return 0
    print(digest)
    print(f"name         {manifest.name}")
    print(f"tags         {' '.join(tags_of(options.images, digest)) or '-'}")
    print(f"guest link   {manifest.link_version}")
    for role, file in manifest.files.items():
        print(f"{role:<12} {render_bytes(file.size_bytes):>10}  {file.digest[:SHORT_CHARS]}")
    print(f"packages     {len(manifest.packages)} (all with --json)")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Reads every byte of an image and compares its digests."""
    digest = resolve(options.images, options.image)
    manifest = verify_image(image_path(options.images, digest), digest)
    if options.json:
        print(json.dumps({"digest": digest, "name": manifest.name, "whole": True}))
    else:
        print(f"{digest}\nwhole: {manifest.name}, {len(manifest.packages)} packages")
    return 0


def export(options: argparse.Namespace) -> int:
    """Writes an image to one file."""
    digest = resolve(options.images, options.image)
    export_image(options.images, digest, options.file)
    size_bytes = options.file.stat().st_size
    if options.json:
        print(json.dumps({"digest": digest, "file": str(options.file), "size_bytes": size_bytes}))
    else:
        print(f"{digest}\n{options.file}: {render_bytes(size_bytes)}")
    return 0


def import_(options: argparse.Namespace) -> int:
    """Takes an image from a file."""
    with sole_builder(options.images, STAGING_PREFIX):
        digest, manifest = import_image(options.images, options.file, options.digest)
        tag = options.tag or f"{manifest.name}:latest"
        if not _TAG.fullmatch(tag):
            raise InvalidSpecError("tag_invalid", f"{tag!r} is no tag", "write it as name:tag", field="--tag")
        write_tag(options.images, tag, digest)
    print(json.dumps({"digest": digest, "tag": tag}) if options.json else f"{digest}\n{tag}")
    return 0


def rm(options: argparse.Namespace) -> int:
    """Removes one image."""
    with sole_builder(options.images, STAGING_PREFIX):
        digest = resolve(options.images, options.image, is_broken_fine=True)
        tags = tags_of(options.images, digest)
        if tags and not options.force:
            message = f"{digest[:SHORT_CHARS]} is what {' '.join(tags)} points at"
            raise ConflictError("image_tagged", message, "build or import what the tag shall be, or say --force")
        _remove(options.images, digest)
    print(json.dumps({"removed": [digest]}) if options.json else f"{digest}\nremoved")
    return 0


def gc(options: argparse.Namespace) -> int:
    """Removes images that nobody uses."""
    within_s = _parse_within_s(options.keep_used_within)
    with sole_builder(options.images, STAGING_PREFIX):
        candidates = [_candidate(options.images, one) for one in list_images(options.images)]
        chosen = choose_garbage(candidates, time.time(), keep_used_within_s=within_s, keep=options.keep)
        for one in chosen:
            if not options.dry_run:
                _remove(options.images, one.digest)
    freed_bytes = sum(one.size_bytes for one in chosen)
    if options.json:
        digests = [one.digest for one in chosen]
        print(json.dumps({"removed": digests, "freed_bytes": freed_bytes, "dry_run": options.dry_run}))
        return 0
    verb = "would be removed" if options.dry_run else "removed"
    for one in chosen:
        print(f"{one.digest[:SHORT_CHARS]} {verb}, {render_bytes(one.size_bytes)}")
    print(f"{len(chosen)} of {len(candidates)} images {verb}, {render_bytes(freed_bytes)}")
    return 0


def resolve(images_dir: Path, name: str, *, is_broken_fine: bool = False) -> str:
    """The digest that `name` means: a tag (`base` is `base:latest`), a digest, or the beginning of exactly one.

    Raises NotFoundError, ConflictError.
    """
    tag = name if ":" in name else f"{name}:{LATEST}"
    if _TAG.fullmatch(tag) and (tagged := read_tag(images_dir, tag)):
        return tagged
    wanted = name if name.startswith("sha256:") else f"sha256:{name}"
    images = list_images(images_dir)
    found = [one.digest for one in images if one.digest.startswith(wanted) and (is_broken_fine or not one.problem)]
    if not found or wanted == "sha256:":
        raise NotFoundError(
            "image_not_found", f"there is no whole image {name!r} in {images_dir}", "mb image ls shows those there are"
        )
    if len(found) > 1:
        raise ConflictError("image_ambiguous", f"{name!r} is the beginning of {len(found)} images", "write more of it")
    return found[0]


def tags_of(images_dir: Path, digest: str) -> tuple[str, ...]:
    """The tags that point at an image."""
    return next((one.tags for one in list_images(images_dir) if one.digest == digest), ())


def last_used(images_dir: Path, digest: str) -> float:
    """When hostd last started a VM from an image, or when it arrived here; seconds since 1970."""
    for path in (images_dir / "used" / digest.removeprefix("sha256:"), image_path(images_dir, digest) / MANIFEST_NAME):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0


def _parse_within_s(text: str) -> float:
    try:
        return parse_duration_s(text, has_days=True)
    except ValueError as error:
        step = "write a number and s, m, h or d, like 7d"
        raise InvalidSpecError("duration_invalid", str(error), step, field="--keep-used-within") from error


def _candidate(images_dir: Path, image: StoredImage) -> Candidate:
    return Candidate(image.digest, bool(image.tags), last_used(images_dir, image.digest), image.size_bytes)


def _remove(images_dir: Path, digest: str) -> None:
    """Tags first, then the name, then the bytes: whoever reads meanwhile finds a whole image or none."""
    if not is_digest(digest):
        raise ValueError(digest)
    for tag in tags_of(images_dir, digest):
        (images_dir / "tags" / tag).unlink(missing_ok=True)
    grave = images_dir / f"{STAGING_PREFIX}{digest[-16:]}"
    image_path(images_dir, digest).rename(grave)
    shutil.rmtree(grave)
    (images_dir / "used" / digest.removeprefix("sha256:")).unlink(missing_ok=True)
