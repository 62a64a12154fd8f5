"""The real image: built here, up to date at once, the same bytes twice, and it boots."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from provisioning.__main__ import main
from provisioning.build import ensure_image
from provisioning.imagestore import image_path
from provisioning.packages import load_lock
from provisioning.recipe import load_recipe
from provisioning.verify import verify_image

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))
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
    assert verify_image(image_path(CACHE / "images", digest), digest).link_version == 2
    started = time.monotonic()
    assert ensure_image(load_recipe("base"), CACHE / "images", CACHE, print) == (digest, False)
    assert time.monotonic() - started < UP_TO_DATE_S


def test_an_image_that_somebody_else_builds_is_the_same_image(capsys: pytest.CaptureFixture[str]) -> None:
    """Two builds from nothing, apart in folder, time, umask, locale, time zone and user, give one digest."""
    code = main(["rebuild", "--json", "--cache", str(CACHE)])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["equal"], found["difference"]) == (0, True, "")
    assert found["digests"] == [_ensure()] * 2


def test_the_tree_has_exactly_the_locked_packages() -> None:
    """What the manifest lists is what the lock says, less what only the build needed."""
    digest = _ensure()
    recipe = load_recipe("base")
    packages = verify_image(image_path(CACHE / "images", digest), digest).packages
    locked = {(one.name, one.version) for one in load_lock(recipe).packages}
    assert set(packages) < locked
    assert not {name for name, _ in packages} & set(recipe.rootfs.build_only)


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
