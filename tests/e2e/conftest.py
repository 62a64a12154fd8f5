"""One embedded fleet for the whole suite, with its own images; when all tests are done nothing of any sandbox may be left."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.identity import Role
from fleet.model.ids import HostId
from fleet.store.keyspace import losses_key
from provisioning.build import ensure_image
from provisioning.cpio import CpioMember, write_cpio
from provisioning.embedded.fleet import EmbeddedFleet, FleetSettings, start_fleet
from provisioning.embedded.leaks import find_leaks
from provisioning.embedded.pki import EMBEDDED_HOST, tls_files
from provisioning.imagestore import image_path, put_image, staging_dir, write_tag
from provisioning.manifest import MANIFEST_NAME, ImageFile, Manifest
from provisioning.recipe import load_recipe
from provisioning.verify import digest_file, verify_image
from tests.e2e.operate import Tenant, forget

CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))
# More vCPUs than the machine has, so that three VMs fit; memory for six small ones, so that a large one fills the host.
VCPUS, MEMORY_MIB = 8, 6144
# hostd's state lies on a filesystem of its own, so that a test can fill it. Files of scratch disks are sparse.
STATE_BYTES = 6 * 1024**3

# PID 1 of a guest that belongs to its attacker from the first instruction on: root, with every capability, before anything of ours.
HOSTILE_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/lib/modules/$module"; done </lib/modules/order
for disk in /sys/block/vd*; do
    read -r serial 2>/dev/null <"$disk/serial"
    node=/dev/${disk##*/}
    echo 0 >"$disk/ro" 2>/dev/null
    busybox blockdev --setrw "$node"
    if echo owned | busybox dd of="$node" bs=512 count=1 conv=fsync 2>/dev/console; then
        echo "hostile: $serial was written" >/dev/console
    else
        echo "hostile: $serial was refused" >/dev/console
    fi
done
echo "hostile: done" >/dev/console
busybox poweroff -f
"""


@pytest.fixture(scope="session")
def fleet() -> Iterator[EmbeddedFleet]:
    """A running fleet; afterwards every trace of every sandbox must be gone."""
    assert os.environ.get("BEDPLATE_PRIVATE") == "1", "this test starts a fleet: run it in private namespaces"
    with tempfile.TemporaryDirectory(prefix="bedplate-e2e-", dir="/var/tmp") as name:
        images_dir = _make_images(Path(name) / "images")
        folder = Path(name) / "fleet"
        folder.mkdir()
        Path(name).chmod(0o711)
        with _own_filesystem(folder / "state"):
            running = start_fleet(folder, FleetSettings(images_dir, VCPUS, MEMORY_MIB), print)
            try:
                yield running
                running.stop_control_plane()
                leaks = find_leaks(folder, running.endpoint)
            finally:
                running.stop()
    assert {kind: found for kind, found in leaks.items() if found} == {}


@pytest.fixture
def tenant(fleet: EmbeddedFleet, tmp_path: Path) -> Iterator[Tenant]:
    """The fleet's tenant, without sandboxes."""
    tenant = Tenant(fleet, tmp_path, fleet.tenant_config)
    yield tenant
    tenant.clear()
    # A host that one test has cut off does not make the next one wait.
    forget(fleet, losses_key(HostId(EMBEDDED_HOST)))


@pytest.fixture
def stranger(fleet: EmbeddedFleet, tmp_path: Path) -> Tenant:
    """Another tenant, with a certificate of the same authority."""
    files = tls_files(fleet.folder / "pki", Role.TENANT, "other")
    config = tmp_path / "other.toml"
    table = f'[tls]\nca = "{files.ca}"\ncertificate = "{files.certificate}"\nkey = "{files.key}"\n'
    config.write_text(fleet.tenant_config.read_text().split("[tls]")[0] + table)
    return Tenant(fleet, tmp_path, config)


@contextmanager
def _own_filesystem(state: Path) -> Iterator[None]:
    """Within it, in this mount namespace, `state` is a filesystem of its own."""
    state.mkdir()
    disk = state.with_name("state.ext4")
    with disk.open("wb") as stream:
        stream.truncate(STATE_BYTES)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
    # The loop device ends with the mount, and that with this namespace at the latest.
    subprocess.run(["mount", "-o", "loop", disk, state], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", state], check=True)


def _make_images(images_dir: Path) -> Path:
    """The image `base`, one that will be damaged, and one whose guest is hostile from its first instruction."""
    digest = ensure_image(load_recipe("base"), CACHE / "images", CACHE, print)[0]
    images_dir.mkdir()
    shutil.copytree(image_path(CACHE / "images", digest), image_path(images_dir, digest))
    write_tag(images_dir, "base:latest", digest)
    manifest = verify_image(image_path(images_dir, digest), digest)
    _derive(images_dir, digest, replace(manifest, name="damaged"), "")
    _derive(images_dir, digest, replace(manifest, name="hostile"), HOSTILE_INIT)
    return images_dir


def _derive(images_dir: Path, digest: str, manifest: Manifest, init: str) -> None:
    """An image like another but for its name and, if given, its first process: the kernel lets a later archive's file win."""
    with staging_dir(images_dir) as staging:
        shutil.copytree(
            image_path(images_dir, digest), staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST_NAME)
        )
        path = staging / manifest.files["initramfs"].path
        if init:
            path.write_bytes(path.read_bytes() + write_cpio([CpioMember("init", 0o100755, init.encode())], 0))
        entry = ImageFile(path.name, digest_file(path), path.stat().st_size)
        derived = put_image(images_dir, staging, replace(manifest, files={**manifest.files, "initramfs": entry}))
    write_tag(images_dir, f"{manifest.name}:latest", derived)
