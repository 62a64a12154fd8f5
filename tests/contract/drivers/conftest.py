"""A real libvirt of this test run's own, in its private namespaces, and what its VMs boot from."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.model.ids import Digest
from provisioning.build import ensure_image
from provisioning.embedded.libvirt import LIBVIRT_URI, start_libvirt
from provisioning.recipe import load_recipe

CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))


@pytest.fixture(scope="session")
def qemu_folder() -> Iterator[Path]:
    """A folder that QEMU's user may pass through, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="bedplate-test-", dir="/var/tmp") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="session")
def libvirt_uri(qemu_folder: Path) -> Iterator[str]:
    """A running libvirt that hides /dev/kvm, as on a host whose probe guest did not boot on it."""
    assert os.environ.get("BEDPLATE_PRIVATE") == "1", "this test starts libvirt: run it in private namespaces"
    libvirt = start_libvirt(qemu_folder / "libvirt", has_kvm=False)
    yield LIBVIRT_URI
    libvirt.stop()


@pytest.fixture(scope="session")
def image_digest() -> Digest:
    """The image `base`, built or found."""
    return Digest(ensure_image(load_recipe("base"), CACHE / "images", CACHE, print)[0])
