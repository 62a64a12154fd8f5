"""An accelerator is what a probe guest booted on: never what a node in /dev promises."""

import os
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.model.host import Accelerator
from fleet.model.ids import Digest
from hostd.drivers.domain_xml import QemuUser
from hostd.drivers.image import ImageStore
from hostd.reconcile.state import BootFiles

CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))
ROOT = QemuUser(0, 0)
KVM = Path("/dev/kvm")
BY_HAND_S = 60.0


def always(boot: BootFiles | None) -> Callable[[], Awaitable[BootFiles | None]]:
    async def find() -> BootFiles | None:
        return boot

    return find


def boots_by_hand(boot: BootFiles) -> bool:
    """Whether the probe guest prints its word on KVM when it is started from here."""
    arguments = ["-accel", "kvm", "-cpu", "host", "-M", "q35", "-m", "256", "-nodefaults", "-display", "none"]
    arguments += ["-serial", "stdio", "-no-reboot", "-kernel", boot.kernel, "-initrd", boot.initramfs]
    command = ["timeout", "20", "qemu-system-x86_64", *arguments, "-append", f"{boot.cmdline} bedplate.probe"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=BY_HAND_S, check=False)
    return b"bedplate-probe-ok" in done.stdout


@pytest.mark.root
@pytest.mark.vm
@pytest.mark.timeout(180)
async def test_the_probe_says_what_a_guest_shows(image_digest: Digest, tmp_path: Path) -> None:
    """It says KVM exactly where a guest boots on it, gives its evidence otherwise, and asks the machine once for each image."""
    from hostd.drivers.hypervisor import AcceleratorProbe  # noqa: PLC0415 (libvirt's binding is not in the fast part)

    boot = await ImageStore(CACHE / "images").ensure_image(image_digest)
    cache = tmp_path / "accelerator.json"
    probe = AcceleratorProbe(ROOT, cache, always(boot))
    accelerator, reason = await probe.run()
    assert (accelerator is Accelerator.KVM) == (KVM.exists() and boots_by_hand(boot)), reason
    assert str(KVM) in reason
    assert (await probe.run()) == (accelerator, reason)
    if not KVM.exists():
        return
    remembered = cache.read_bytes()
    await AcceleratorProbe(ROOT, cache, always(replace(boot, digest=Digest("sha256:" + "0" * 64)))).run()
    assert cache.read_bytes() != remembered


@pytest.mark.root
async def test_without_a_device_or_an_image_it_is_emulation(tmp_path: Path) -> None:
    """Both reasons are told with what would change them, and neither is remembered: they may pass."""
    from hostd.drivers.hypervisor import AcceleratorProbe  # noqa: PLC0415

    cache, node = tmp_path / "accelerator.json", tmp_path / "kvm"
    accelerator, reason = await AcceleratorProbe(ROOT, cache, always(None), node).run()
    assert (accelerator, "there is no" in reason) == (Accelerator.TCG, True)
    node.touch()
    accelerator, reason = await AcceleratorProbe(ROOT, cache, always(None), node).run()
    assert (accelerator, "no image to probe" in reason) == (Accelerator.TCG, True)
    assert not cache.exists()
