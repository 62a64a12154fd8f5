"""Where hostd keeps things: filesystems and room, and the images, every byte of them."""

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fleet.errors import BedplateError
from fleet.model.ids import Digest
from fleet.model.units import GIB
from hostd.config import HostdConfig
from hostd.doctor.finding import Finding, fail, ok, warn
from hostd.drivers.image import ImageStore

# An image, a scratch disk and some output: below this nothing can start.
FREE_BYTES_MIN = 2 * GIB
FREE_BYTES_COMFORTABLE = 20 * GIB
# What a reboot takes away, and what more than one machine writes.
VOLATILE = frozenset({"tmpfs", "ramfs"})
SHARED = frozenset({"nfs", "nfs4", "cifs", "9p", "fuse", "fuse.sshfs", "ceph", "glusterfs", "virtiofs"})
# Each image is read whole, some 100 MB: more would take minutes, and a host has a handful.
TAGS_MAX = 100
# "sha256:" and 64 digits; a damaged file is not read further.
DIGEST_CHARS_MAX = 100

_OCTAL = re.compile(r"\\([0-7]{3})")


def check_storage(config: HostdConfig, proc: Path = Path("/proc")) -> Iterator[Finding]:
    """The folders that must last, then the images."""
    yield _check_folder("state_dir", config.state_dir, proc)
    yield _check_folder("images_dir", config.images_dir, proc)
    yield from check_images(config.images_dir)


def _check_folder(name: str, folder: Path, proc: Path) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    kind, usage = filesystem_of(there, proc), shutil.disk_usage(there)
    found = f"{folder}, {usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB on {kind}"
    if kind in VOLATILE:
        return fail(name, found, "put it on a disk: a reboot would lose what runs here, and agents would run again")
    if kind in SHARED:
        return fail(name, found, "put it on a disk of this machine: two hosts must not share it")
    if usage.free < FREE_BYTES_MIN:
        return fail(name, found, f"free {FREE_BYTES_MIN / GIB:.0f} GiB or more")
    if usage.free < FREE_BYTES_COMFORTABLE:
        return warn(name, found, f"few sandboxes fit; {FREE_BYTES_COMFORTABLE / GIB:.0f} GiB or more is better")
    return ok(name, found)


def filesystem_of(path: Path, proc: Path = Path("/proc")) -> str:
    """The kind of the filesystem that `path` is on, by /proc/self/mountinfo (proc(5)): the last mount on the nearest folder."""
    resolved, best, kind = path.resolve(), -1, "unknown"
    for line in (proc / "self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        mounted = Path(_OCTAL.sub(lambda found: chr(int(found[1], 8)), before.split()[4]))
        if resolved.is_relative_to(mounted) and len(mounted.parts) >= best:
            best, kind = len(mounted.parts), after.split()[0]
    return kind


def check_images(images_dir: Path) -> Iterator[Finding]:
    """Every tagged image, read whole."""
    tags = sorted(path for path in (images_dir / "tags").glob("[!.]*") if path.is_file())[:TAGS_MAX]
    if not tags:
        next_step = f"python -m provisioning build --images {images_dir}, or copy one there"
        yield fail("images", f"there is none in {images_dir}", next_step)
        return
    names = {tag.name: Digest(tag.read_text(errors="replace").strip()[:DIGEST_CHARS_MAX]) for tag in tags}
    yield from asyncio.run(_verify(ImageStore(images_dir), names))


async def _verify(store: ImageStore, names: dict[str, Digest]) -> list[Finding]:
    return [await _verify_one(store, name, digest) for name, digest in names.items()]


async def _verify_one(store: ImageStore, name: str, digest: Digest) -> Finding:
    try:
        await store.check_image(digest)
    except BedplateError as error:
        return fail("image", f"{name}: {error.message}", error.next_step)
    return ok("image", f"{name}, {digest[:19]}… is whole")
