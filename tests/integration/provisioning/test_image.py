"""The real image: built here, up to date at once, the same bytes twice, and it boots."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from provisioning.build import ensure_image
from provisioning.guestapp import pack_guestd
from provisioning.imagestore import image_path
from provisioning.initramfs import build_initramfs
from provisioning.recipe import load_recipe
from provisioning.rootfs import ensure_rootfs_tar, unpack_rootfs
from provisioning.verify import verify_image

pytestmark = pytest.mark.root

CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))
PROJECT = Path(__file__).parents[3]
# A probe boots in under 3 s alone; a busy machine with emulated CPUs takes many times that.
BOOT_TIMEOUT_S = 120
UP_TO_DATE_S = 2.0
TCG = ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max", "-M", "q35", "-m", "256"]
BARE = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]


def _ensure() -> str:
    return ensure_image(load_recipe("base"), CACHE / "images", CACHE, print)[0]


def test_a_built_image_is_whole_and_building_it_again_takes_no_time() -> None:
    """Every byte has its digest, and `./dev demo` does not pay for the image a second time."""
    digest = _ensure()
    assert verify_image(image_path(CACHE / "images", digest), digest).link_version == 1
    started = time.monotonic()
    assert ensure_image(load_recipe("base"), CACHE / "images", CACHE, print) == (digest, False)
    assert time.monotonic() - started < UP_TO_DATE_S


def test_the_parts_are_the_same_when_made_twice() -> None:
    """The initramfs and guestd depend on what goes in, not on where, when or in which order it is read."""
    recipe = load_recipe("base")
    tar = ensure_rootfs_tar(recipe, CACHE)
    made = []
    for _ in range(2):
        # Not tmp_path: pytest keeps the last of those, and a tree is 270 MB.
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            unpack_rootfs(tar, root)
            made.append((build_initramfs(root, recipe), pack_guestd(PROJECT, root)))
    assert made[0] == made[1]


@pytest.mark.vm
def test_the_probe_boots_without_any_disk_and_powers_off() -> None:
    """hostd believes in an accelerator only when this guest has run on it; it needs kernel and initramfs alone."""
    digest = _ensure()
    folder = image_path(CACHE / "images", digest)
    cmdline = f"{verify_image(folder, digest).cmdline} bedplate.probe"
    boot = ["-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initramfs.img"), "-append", cmdline]
    done = subprocess.run(
        ["qemu-system-x86_64", *TCG, *BARE, *boot],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BOOT_TIMEOUT_S,
        check=True,
    )
    assert "bedplate-probe-ok" in done.stdout
