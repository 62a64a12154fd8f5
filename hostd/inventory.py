"""What this host has to give: read from the machine, lowered or raised by its operator. Knows no store."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from fleet.errors import HostFaultError, InvalidSpecError
from fleet.model.admission import is_label
from fleet.model.host import Capacity, NumaNode
from fleet.model.sandbox import Label
from fleet.model.units import MIB

MEMINFO = Path("/proc/meminfo")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NUMA_NODES = Path("/sys/devices/system/node")
# Past this a sandbox's guest waits longer for its CPU than guestd's heartbeats are waited for.
VCPU_OVERCOMMIT_MAX = 16
# What the host keeps for its kernel, libvirt, hostd and the page cache: a tenth, and never less than a GiB.
HOST_MEMORY_SHARE, HOST_MEMORY_MIB_MIN = 10, 1024
# Scratch disks may fill what is free, apart from a tenth for logs, output, artifacts and sources.
HOST_DISK_SHARE = 10
# One bridge takes 1024 ports (BR_MAX_PORTS of the kernel), and every sandbox is one.
SANDBOXES_MAX = 1000


@dataclass(frozen=True, slots=True)
class CapacitySettings:
    """What an operator sets aside for sandboxes; 0 takes what the machine has.

    `vcpus` past the machine's own overcommits like `vcpu_overcommit`, but says nothing of it to whoever places.
    """

    vcpus: int = 0
    memory_mib: int = 0
    disk_mib: int = 0
    sandboxes: int = SANDBOXES_MAX


@dataclass(frozen=True, slots=True)
class InventorySettings:
    """Capacity, the labels that jcards may require, and the taints that they must tolerate.

    `vcpu_overcommit` vCPUs are promised for each of the capacity's.
    """

    capacity: CapacitySettings = CapacitySettings()
    labels: dict[str, str] = field(default_factory=dict)
    taints: dict[str, str] = field(default_factory=dict)
    vcpu_overcommit: float = 1.0

    def check(self) -> None:
        """Raises InvalidSpecError for a number below zero, or a label that no sandbox could require."""
        for name in ("vcpus", "memory_mib", "disk_mib", "sandboxes"):
            if getattr(self.capacity, name) < 0:
                where = f"inventory.capacity.{name}"
                raise InvalidSpecError("config_invalid", "it is below zero", "0 takes what there is", field=where)
        for table, names in (("labels", self.labels), ("taints", self.taints)):
            for name, value in names.items():
                if not is_label(name, value):
                    where, next_step = f"inventory.{table}.{name}", "use letters, digits and . _ / - inside"
                    raise InvalidSpecError("config_invalid", "it is no label", next_step, field=where)
        if not 1 <= self.vcpu_overcommit <= VCPU_OVERCOMMIT_MAX:
            message = f"{self.vcpu_overcommit:g} is not between 1 and {VCPU_OVERCOMMIT_MAX}"
            next_step = "write how many vCPUs each CPU is promised as, 1 for no overcommit"
            raise InvalidSpecError("config_invalid", message, next_step, field="inventory.vcpu_overcommit")


def read_capacity(settings: CapacitySettings, state_dir: Path, scratch_dir: Path) -> Capacity:
    """The host's capacity; what scratch disks occupy already counts as free, for its reservations are counted elsewhere.

    Raises HostFaultError `capacity_impossible` when the operator promises more memory or disk than there is.
    """
    memory_mib = _usable_memory_mib()
    disk_mib = _usable_disk_mib(state_dir, scratch_dir)
    _check_promise("memory_mib", settings.memory_mib, memory_mib)
    # Against the whole disk: what fills it later lowers what is offered, and never keeps a host with VMs from starting.
    _check_promise("disk_mib", settings.disk_mib, shutil.disk_usage(state_dir).total // MIB)
    return Capacity(
        vcpus=settings.vcpus or os.cpu_count() or 1,
        memory_mib=settings.memory_mib or memory_mib,
        disk_mib=min(settings.disk_mib or disk_mib, disk_mib),
        sandboxes=min(settings.sandboxes, SANDBOXES_MAX),
    )


def read_labels(settings: InventorySettings) -> tuple[Label, ...]:
    """The operator's labels, and what the machine says of itself: `arch`."""
    labels = {"arch": os.uname().machine, **settings.labels}
    return tuple(Label(name, value) for name, value in sorted(labels.items()))


def read_taints(settings: InventorySettings) -> tuple[Label, ...]:
    """What a sandbox must tolerate to be placed here."""
    return tuple(Label(name, value) for name, value in sorted(settings.taints.items()))


def read_numa_nodes(capacity: Capacity, nodes_dir: Path = NUMA_NODES) -> tuple[NumaNode, ...]:
    """Each NUMA node's part of `capacity`, as the kernel tells it (sysfs-devices-node); none for a machine of one node.

    Nodes that have memory only, or CPUs only, are left out: nothing fits on them alone.
    """
    found = []
    for path in sorted(nodes_dir.glob("node[0-9]*")):
        cpus, memory_kib = _count_cpus((path / "cpulist").read_text()), _node_memory_kib((path / "meminfo").read_text())
        if cpus and memory_kib:
            found.append((int(path.name.removeprefix("node")), cpus, memory_kib))
    if len(found) < 2:
        return ()
    all_cpus, all_kib = sum(cpus for _, cpus, _ in found), sum(memory_kib for _, _, memory_kib in found)
    return tuple(
        NumaNode(node, capacity.vcpus * cpus // all_cpus, capacity.memory_mib * memory_kib // all_kib)
        for node, cpus, memory_kib in sorted(found)
    )


def read_boot_id() -> str:
    """What tells one boot of this machine from another."""
    return BOOT_ID.read_text().strip()


def _count_cpus(cpulist: str) -> int:
    """How many CPUs a list of the kernel's names: "0-3,8-11" are eight."""
    ranges = [part.partition("-") for part in cpulist.strip().split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def _node_memory_kib(meminfo: str) -> int:
    return next((int(line.split()[3]) for line in meminfo.splitlines() if " MemTotal:" in line), 0)


def _usable_memory_mib() -> int:
    total_kib = next(int(line.split()[1]) for line in MEMINFO.read_text().splitlines() if line.startswith("MemTotal:"))
    total_mib = total_kib // 1024
    return max(0, total_mib - max(HOST_MEMORY_MIB_MIN, total_mib // HOST_MEMORY_SHARE))


def _usable_disk_mib(state_dir: Path, scratch_dir: Path) -> int:
    # st_blocks counts 512 bytes each, whatever the filesystem's own block is (stat(2)).
    occupied = sum(path.stat().st_blocks * 512 for path in scratch_dir.glob("*.raw"))
    free_mib = (shutil.disk_usage(state_dir).free + occupied) // MIB
    return free_mib - free_mib // HOST_DISK_SHARE


def _check_promise(name: str, promised: int, usable: int) -> None:
    if promised > usable:
        message = f"inventory.capacity.{name}: {promised} is more than the {usable} this machine can give"
        raise HostFaultError("capacity_impossible", message, "lower it, or set 0 to take what there is")
