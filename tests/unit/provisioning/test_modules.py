"""Kernel modules: each is loaded after everything it needs."""

import lzma
from pathlib import Path

import pytest

from fleet.errors import HostFaultError
from provisioning.modules import load_order, read_module, read_modules, unpacked_name

DEPENDS = """\
kernel/drivers/net/virtio_net.ko.xz: kernel/net/core/net_failover.ko.xz kernel/net/core/failover.ko.xz
kernel/net/core/net_failover.ko.xz: kernel/net/core/failover.ko.xz
kernel/net/core/failover.ko.xz:
kernel/drivers/char/hw_random/virtio-rng.ko.xz:
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one kernel that has four modules and ext4 built in."""
    folder = tmp_path / "usr/lib/modules/6.12"
    (folder / "kernel/net/core").mkdir(parents=True)
    (folder / "modules.dep").write_text(DEPENDS)
    (folder / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    (folder / "kernel/net/core/failover.ko.xz").write_bytes(lzma.compress(b"\x7fELF failover"))
    return tmp_path


def test_dependencies_come_first_and_once(root: Path) -> None:
    """insmod, unlike modprobe, resolves nothing: the written order is all it has."""
    order = load_order(read_modules(root), ("virtio_net", "failover", "virtio_rng"))
    names = [path.rsplit("/", 1)[-1] for path in order]
    assert names == ["failover.ko.xz", "net_failover.ko.xz", "virtio_net.ko.xz", "virtio-rng.ko.xz"]


def test_what_is_built_in_needs_no_loading(root: Path) -> None:
    """A module that a newer kernel builds in must not break the recipe."""
    assert load_order(read_modules(root), ("ext4",)) == ()


def test_an_unknown_module_is_refused(root: Path) -> None:
    """A missing driver is found by the build, not by a guest that does not find its disk."""
    with pytest.raises(HostFaultError) as refused:
        load_order(read_modules(root), ("virtio_gpu",))
    assert refused.value.code == "kernel_module_not_found"


def test_modules_are_unpacked_for_the_initramfs(root: Path) -> None:
    """The initramfs carries plain modules under plain names."""
    path = "kernel/net/core/failover.ko.xz"
    assert read_module(read_modules(root), path) == b"\x7fELF failover"
    assert unpacked_name(path) == "kernel/net/core/failover.ko"


def test_a_second_kernel_is_refused(root: Path) -> None:
    """Which of two kernels an image boots is never left to chance."""
    (root / "usr/lib/modules/6.13").mkdir()
    with pytest.raises(HostFaultError) as refused:
        read_modules(root)
    assert refused.value.code == "kernel_not_found"
