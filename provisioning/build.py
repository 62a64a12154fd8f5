"""Builds one image from its recipe, or finds that it is built already.

recipe + lock + guestd + guest scripts + this builder = key;  key known and image whole -> nothing to do
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from provisioning.lock import describe_difference, encode_lock, refresh_step
from provisioning.manifest import ImageFile, Manifest
from provisioning.packages import load_lock
from provisioning.programs import keep_program
from provisioning.recipe import Recipe
from provisioning.rootfs import (
    GUEST_DIR,
    compile_python,
    customise_root,
    ensure_rootfs_tar,
    list_packages,
    purge_packages,
    unpack_rootfs,
)
from provisioning.verify import digest_file
from provisioning.verity import Verity, append_tree

MKFS_TIMEOUT_S = 300.0
# Decision 0022: built into the kernel, and fast where CPUs have instructions for it.
VERITY_ALGORITHM = "sha256"
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
    """64 hex digits over everything that decides an image's content."""
    hasher = hashlib.sha256(recipe.digest.encode() + encode_lock(load_lock(recipe)).encode())
    builder = sorted(Path(__file__).parent.glob("*.py"))
    for path in (*builder, *sorted(GUEST_DIR.iterdir()), *find_guestd_sources(PROJECT)):
        hasher.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()


def _build(recipe: Recipe, images_dir: Path, cache_dir: Path, progress: Callable[[str], None]) -> str:
    tar = ensure_rootfs_tar(recipe, cache_dir, progress)
    with (
        staging_dir(images_dir) as staging,
        tempfile.TemporaryDirectory(prefix=TREE_PREFIX, dir=cache_dir) as name,
        _plain_umask(),
    ):
        root, tools = Path(name) / "root", Path(name) / "tools"
        root.mkdir()
        progress("unpack")
        unpack_rootfs(tar, root)
        _check_packages(recipe, root)
        progress("kernel and initramfs")
        _copy_kernel(root, staging / FILES["kernel"])
        (staging / FILES["initramfs"]).write_bytes(build_initramfs(root, recipe))
        mkfs = keep_program(root, "usr/bin/mkfs.erofs", tools)
        purge_packages(root, recipe.rootfs.build_only)
        packages = list_packages(root)
        progress("guestd and the Python library, compiled")
        compile_python(root)
        customise_root(root, recipe, pack_guestd(PROJECT, root))
        progress("root filesystem")
        _make_root(mkfs, root, staging / FILES["root"], recipe)
        progress("hash tree and digests")
        cmdline = (*recipe.cmdline, _add_verity(staging / FILES["root"], recipe).render_option())
        return put_image(images_dir, staging, _manifest(recipe, staging, packages, " ".join(cmdline)))


@contextmanager
def _plain_umask() -> Iterator[None]:
    """Folders that are made on the way have the modes of the code, whoever builds."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


def _check_packages(recipe: Recipe, root: Path) -> None:
    difference = describe_difference(load_lock(recipe), list_packages(root))
    if difference:
        message = f"the packages of {recipe.name} do not resolve to its lock: {difference}"
        raise HostFaultError("lock_mismatch", message, refresh_step(recipe.name))


def _copy_kernel(root: Path, target: Path) -> None:
    kernels = sorted((root / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise HostFaultError("kernel_not_found", f"one kernel is needed, not {[path.name for path in kernels]}")
    shutil.copyfile(kernels[0], target)


def _make_root(mkfs: list[str], root: Path, target: Path, recipe: Recipe) -> None:
    # lz4 takes a third off the size; boots with it and without measured the same, under emulation too.
    options = ["--quiet", "-zlz4", f"-T{recipe.epoch_s}", f"-U{recipe.root_uuid}"]
    run_command([*mkfs, *options, str(target), str(root)], timeout_s=MKFS_TIMEOUT_S)


def _add_verity(disk: Path, recipe: Recipe) -> Verity:
    # Known to everybody and the same in each build: it only keeps trees of different recipes apart.
    salt = hashlib.sha256(recipe.root_uuid.encode()).digest()
    with disk.open("r+b") as stream:
        return append_tree(stream, VERITY_ALGORITHM, salt)


def _manifest(recipe: Recipe, staging: Path, packages: tuple[tuple[str, str], ...], cmdline: str) -> Manifest:
    files = {
        role: ImageFile(name, digest_file(staging / name), (staging / name).stat().st_size)
        for role, name in FILES.items()
    }
    return Manifest(
        name=recipe.name,
        architecture=recipe.architecture,
        link_version=recipe.link_version,
        cmdline=cmdline,
        files=files,
        packages=packages,
    )
