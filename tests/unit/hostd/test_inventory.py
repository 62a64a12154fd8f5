"""What a host says it can carry: never more memory or disk than the machine has, and what its operator says besides."""

import os
from pathlib import Path

import pytest

from fleet.errors import HostFaultError, InvalidSpecError
from fleet.model.host import Capacity
from hostd.inventory import (
    SANDBOXES_MAX,
    CapacitySettings,
    InventorySettings,
    read_boot_id,
    read_capacity,
    read_labels,
    read_numa_nodes,
    read_taints,
)

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
    written_mib = 1024
    before = read_capacity(CapacitySettings(), tmp_path, tmp_path / "none")
    scratch = tmp_path / "a.raw"
    with scratch.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, written_mib * 1024**2)
    after = read_capacity(CapacitySettings(), tmp_path, tmp_path)
    scratch.unlink()
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


def test_taints_are_the_operators() -> None:
    """In order; a host without any turns nobody away."""
    taints = read_taints(InventorySettings(taints={"team": "ml", "gpu": ""}))
    assert [(taint.name, taint.value) for taint in taints] == [("gpu", ""), ("team", "ml")]
    assert read_taints(InventorySettings()) == ()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (InventorySettings(taints={"no label": ""}), "inventory.taints.no label"),
        (InventorySettings(vcpu_overcommit=0.5), "inventory.vcpu_overcommit"),
        (InventorySettings(vcpu_overcommit=17), "inventory.vcpu_overcommit"),
        (InventorySettings(vcpu_overcommit=float("nan")), "inventory.vcpu_overcommit"),
    ],
)
def test_what_nobody_could_place_by_is_refused(settings: InventorySettings, field: str) -> None:
    """The error names the field and the next step."""
    with pytest.raises(InvalidSpecError) as caught:
        settings.check()
    assert (caught.value.code, caught.value.field, bool(caught.value.next_step)) == ("config_invalid", field, True)


def put_nodes(folder: Path, *nodes: tuple[str, int]) -> Path:
    """A sysfs with these nodes: which CPUs each has, and how much memory in KiB."""
    for number, (cpulist, memory_kib) in enumerate(nodes):
        path = folder / f"node{number}"
        path.mkdir()
        (path / "cpulist").write_text(cpulist + "\n")
        (path / "meminfo").write_text(f"Node {number} MemTotal:  {memory_kib} kB\nNode {number} MemFree: 1 kB\n")
    (folder / "has_cpu").write_text("0-1\n")
    return folder


def test_numa_nodes_share_what_the_host_promises(tmp_path: Path) -> None:
    """By their CPUs and memory; all of them together are never more than the capacity."""
    nodes = put_nodes(tmp_path, ("0-2,6-8", 3 << 20), ("3-5,9-11", 1 << 20), ("", 8 << 20))
    found = read_numa_nodes(Capacity(vcpus=11, memory_mib=4001, disk_mib=1, sandboxes=1), nodes)
    assert [(one.node, one.vcpus, one.memory_mib) for one in found] == [(0, 5, 3000), (1, 5, 1000)]


def test_a_machine_of_one_node_has_none(tmp_path: Path) -> None:
    """Nor has one whose kernel tells of none."""
    capacity = Capacity(4, 4096, 1, 1)
    assert read_numa_nodes(capacity, put_nodes(tmp_path, ("0-3", 1 << 20), ("", 1 << 20))) == ()
    assert read_numa_nodes(capacity, tmp_path / "gone") == ()


def test_a_boot_has_one_id() -> None:
    """It stays the same for as long as the machine is up."""
    assert read_boot_id() == read_boot_id()
    assert len(read_boot_id()) == 36
