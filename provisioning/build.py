"""Builds one image from its recipe, or finds that it is built already.

recipe + guestd + guest scripts + this builder = key;  key known and image whole -> nothing to do
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fleet.errors import HostFaultError, UnavailableError
from provisioning.command import run_command
from provisioning.guestapp import find_guestd_sources, pack_guestd
from provisioning.imagestore import (
    STAGING_PREFIX,
    find_built,
    put_image,
    read_tag,
    sole_builder,
    staging_dir,
    write_key,
    write_tag,
)
from provisioning.initramfs import build_initramfs
from provisioning.manifest import ImageFile, Manifest
from provisioning.recipe import Recipe
from provisioning.rootfs import (
    GUEST_DIR,
    compile_python,
    customise_root,
    ensure_rootfs_tar,
    list_packages,
    unpack_rootfs,
)
from provisioning.verify import digest_file

MKFS_TIMEOUT_S = 300.0
PROJECT = Path(__file__).parent.parent
# A tree that is being made, in the cache; what a killed build left is removed by the next.
TREE_PREFIX = ".root-"
FILES = {"kernel": "vmlinuz", "initramfs": "initramfs.img", "root": "root.erofs"}


def ensure_image(
    recipe: Recipe, images_dir: Path, cache_dir: Path, progress: Callable[[str], None]
) -> tuple[str, bool]:
    """The digest of the recipe's image, tagged `<name>:latest`, and whether it was built now.

    Building needs root. One build at a time works in a folder; another waits and then finds the image. Raises UnavailableError
    without root, HostFaultError `command_failed` with the last words of the program that failed.
    """
    key = build_key(recipe)
    digest = find_built(images_dir, key, full=False)
    is_new = False
    if digest is None:
        if os.geteuid() != 0:
            raise UnavailableError("root_needed", "building an image needs root", "run it as root, or copy the image")
        with sole_builder(cache_dir, TREE_PREFIX), sole_builder(images_dir, STAGING_PREFIX):
            digest = find_built(images_dir, key, full=False)
            is_new = digest is None
            if digest is None:
                digest = _build(recipe, images_dir, cache_dir, progress)
                write_key(images_dir, key, digest)
    if read_tag(images_dir, f"{recipe.name}:latest") != digest:
        write_tag(images_dir, f"{recipe.name}:latest", digest)
    return digest, is_new


def build_key(recipe: Recipe) -> str:
    """64 hex digits over everything that decides an image's content, the package versions of a fresh bootstrap apart."""
    hasher = hashlib.sha256(recipe.digest.encode())
    builder = sorted(Path(__file__).parent.glob("*.py"))
    for path in (*builder, *sorted(GUEST_DIR.iterdir()), *find_guestd_sources(PROJECT)):
        hasher.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()


def _build(recipe: Recipe, images_dir: Path, cache_dir: Path, progress: Callable[[str], None]) -> str:
    progress(f"packages of {recipe.rootfs.suite} (cached after the first build)")
    tar = ensure_rootfs_tar(recipe, cache_dir)
    with staging_dir(images_dir) as staging, tempfile.TemporaryDirectory(prefix=TREE_PREFIX, dir=cache_dir) as name:
        root = Path(name)
        root.chmod(0o755)
        progress("unpack")
        unpack_rootfs(tar, root)
        packages = list_packages(root)
        progress("kernel and initramfs")
        _copy_kernel(root, staging / FILES["kernel"])
        (staging / FILES["initramfs"]).write_bytes(build_initramfs(root, recipe))
        progress("guestd and the Python library, compiled")
        compile_python(root)
        customise_root(root, recipe, pack_guestd(PROJECT, root))
        progress("root filesystem")
        _make_root(root, staging / FILES["root"], recipe)
        progress("digests")
        return put_image(images_dir, staging, _manifest(recipe, staging, packages))


def _copy_kernel(root: Path, target: Path) -> None:
    kernels = sorted((root / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise HostFaultError("kernel_not_found", f"one kernel is needed, not {[path.name for path in kernels]}")
    shutil.copyfile(kernels[0], target)


def _make_root(root: Path, target: Path, recipe: Recipe) -> None:
    # lz4 takes a third off the size; boots with it and without measured the same, under emulation too.
    arguments = ["mkfs.erofs", "-zlz4", f"-T{recipe.epoch_s}", f"-U{recipe.root_uuid}", str(target), str(root)]
    run_command(arguments, timeout_s=MKFS_TIMEOUT_S)


def _manifest(recipe: Recipe, staging: Path, packages: tuple[tuple[str, str], ...]) -> Manifest:
    files = {
        role: ImageFile(name, digest_file(staging / name), (staging / name).stat().st_size)
        for role, name in FILES.items()
    }
    return Manifest(
        name=recipe.name,
        architecture=recipe.architecture,
        link_version=recipe.link_version,
        cmdline=" ".join(recipe.cmdline),
        files=files,
        packages=packages,
    )
