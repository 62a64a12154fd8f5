"""What a host says it can carry: never more memory or disk than the machine has, and what its operator says besides."""

import os
from pathlib import Path

import pytest

from fleet.errors import HostFaultError
from hostd.inventory import SANDBOXES_MAX, CapacitySettings, InventorySettings, read_boot_id, read_capacity, read_labels

TOO_MUCH_MIB = 1 << 40


def total_memory_mib() -> int:
    """The machine's memory, read in another way."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024**2


def test_zero_takes_what_the_machine_has(tmp_path: Path) -> None:
    """Every CPU, and of memory and disk what the host does not keep for itself."""
    capacity = read_capacity(CapacitySettings(), tmp_path, tmp_path)
    free_mib = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize // 1024**2
    assert (capacity.vcpus, capacity.sandboxes) == (os.cpu_count(), SANDBOXES_MAX)
    assert total_memory_mib() * 0.5 < capacity.memory_mib <= total_memory_mib() - 1024
    assert free_mib * 0.8 < capacity.disk_mib < free_mib


def test_cpus_may_be_overcommitted_memory_may_not(tmp_path: Path) -> None:
    """Time can be shared; memory and disk that are promised twice are missing once."""
    settings = CapacitySettings(vcpus=10_000, memory_mib=64, disk_mib=128, sandboxes=3)
    capacity = read_capacity(settings, tmp_path, tmp_path)
    assert (capacity.vcpus, capacity.memory_mib, capacity.disk_mib, capacity.sandboxes) == (10_000, 64, 128, 3)


@pytest.mark.parametrize("name", ["memory_mib", "disk_mib"])
def test_a_promise_that_cannot_be_kept_is_refused(tmp_path: Path, name: str) -> None:
    """The error names the setting and what the machine could give."""
    with pytest.raises(HostFaultError, match=f"inventory.capacity.{name}") as caught:
        read_capacity(CapacitySettings(**{name: TOO_MUCH_MIB}), tmp_path, tmp_path)
    assert (caught.value.code, bool(caught.value.next_step)) == ("capacity_impossible", True)


def test_scratch_disks_count_as_free(tmp_path: Path) -> None:
    """What sandboxes have written already is theirs by reservation: counting it twice would shrink a busy host."""
    written_mib = 32
    before = read_capacity(CapacitySettings(), tmp_path, tmp_path / "none")
    (tmp_path / "a.raw").write_bytes(os.urandom(written_mib * 1024**2))
    os.sync()
    after = read_capacity(CapacitySettings(), tmp_path, tmp_path)
    # Others write to the same disk meanwhile.
    assert abs(after.disk_mib - before.disk_mib) < written_mib * 0.9


def test_labels_are_the_operators_and_the_machines() -> None:
    """`arch` is told by the machine unless its operator says otherwise; labels come in order."""
    labels = read_labels(InventorySettings(labels={"zone": "rack1", "disk": "nvme"}))
    assert [(label.name, label.value) for label in labels] == [
        ("arch", os.uname().machine),
        ("disk", "nvme"),
        ("zone", "rack1"),
    ]
    assert [label.value for label in read_labels(InventorySettings(labels={"arch": "test"}))] == ["test"]


def test_a_boot_has_one_id() -> None:
    """It stays the same for as long as the machine is up."""
    assert read_boot_id() == read_boot_id()
    assert len(read_boot_id()) == 36
