"""The image of this checkout, and a site for each module of tests."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioning.build import ensure_image
from provisioning.imagestore import image_path
from provisioning.recipe import load_recipe
from provisioning.verify import verify_image
from tests.integration.guestd.parts import Boot, Site

CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))
TCG_CMDLINE = "mitigations=off tsc=reliable no_timer_check"


@pytest.fixture(scope="session")
def boot() -> Boot:
    """The image of this checkout, built if it is not up to date."""
    digest, _ = ensure_image(load_recipe("base"), CACHE / "images", CACHE, lambda _step: None)
    folder = image_path(CACHE / "images", digest)
    cmdline = f"{verify_image(folder, digest).cmdline} {TCG_CMDLINE}"
    return Boot(folder / "vmlinuz", folder / "initramfs.img", folder / "root.erofs", cmdline)


@pytest.fixture(scope="module")
def site(boot: Boot) -> Iterator[Site]:
    """A site of its own for each module of tests; its VMs are gone afterwards."""
    # Not tmp_path: a socket's path has 108 bytes.
    with tempfile.TemporaryDirectory(prefix="bp-guestd-") as name:
        made = Site(boot, Path(name))
        try:
            yield made
        finally:
            made.close()
