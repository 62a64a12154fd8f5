"""A host: what it can carry, whether it is alive, what is set aside on it."""

from dataclasses import dataclass
from enum import StrEnum

from fleet.model.assignment import GpuShare
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Label, NetworkMode, Resources

# The name of an image that no tag points at: nobody can ask for it, a started sandbox has it by its digest.
UNTAGGED = ""


class Accelerator(StrEnum):
    """What a probe guest booted on."""

    KVM = "kvm"
    TCG = "tcg"
    SIMULATED = "simulated"


@dataclass(frozen=True, slots=True)
class Capacity:
    """What sandboxes may use of a host, after the host's own share is taken off."""

    vcpus: int
    memory_mib: int
    disk_mib: int
    sandboxes: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device that can be given to sandboxes, by its PCI address; devices on one `pcie_switch` reach each other fastest."""

    device_id: str
    model: str
    memory_mib: int
    numa_node: int = -1
    pcie_switch: str = ""
    is_shareable: bool = False


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One NUMA node's part of a host's capacity."""

    node: int
    vcpus: int
    memory_mib: int


@dataclass(frozen=True, slots=True)
class HostImage:
    """An image that a host holds, verified; `name` carries the tag, and is UNTAGGED for one that only a sandbox there needs."""

    name: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class HostRecord:
    """A host's registration; it stays when the host is away.

    `is_fenced`: it ends its VMs by itself when it cannot renew its lease, so that its sandboxes may be placed anew.
    """

    host_id: HostId
    address: str
    capacity: Capacity
    labels: tuple[Label, ...]
    images: tuple[HostImage, ...]
    accelerator: Accelerator
    accelerator_reason: str
    network_modes: tuple[NetworkMode, ...]
    version: str
    registered_at_ms: int
    vcpu_overcommit_milli: int = 1000
    gpus: tuple[Gpu, ...] = ()
    numa_nodes: tuple[NumaNode, ...] = ()
    taints: tuple[Label, ...] = ()
    is_fenced: bool = False


@dataclass(frozen=True, slots=True)
class HostAlive:
    """A host's proof of life: bound to its lease, gone with it."""

    host_id: HostId
    boot_id: str
    since_ms: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """What assignments set aside on a host; its key is also the fence between two placing schedulers."""

    host_id: HostId
    vcpus: int = 0
    memory_mib: int = 0
    disk_mib: int = 0
    sandboxes: int = 0
    gpus: tuple[GpuShare, ...] = ()


@dataclass(frozen=True, slots=True)
class HostCordon:
    """No new sandboxes on this host, by an operator's word; those on it run on, unless it is draining.

    A drain moves `moves_max` sandboxes at a time; one that cannot run on elsewhere is waited for, or stopped if `is_forced`.
    """

    host_id: HostId
    by: str
    at_ms: int
    reason: str = ""
    is_draining: bool = False
    moves_max: int = 0
    is_forced: bool = False


@dataclass(frozen=True, slots=True)
class HostLosses:
    """When a host was lost of late, the last time last; nothing is placed there before `until_ms`."""

    host_id: HostId
    at_ms: tuple[int, ...]
    until_ms: int


@dataclass(frozen=True, slots=True)
class Host:
    """A host as clients see it."""

    record: HostRecord
    is_alive: bool
    reserved: Reservation
    cordon: HostCordon | None = None
    losses: HostLosses | None = None


@dataclass(frozen=True, slots=True)
class Straggler:
    """Why one sandbox has not left a draining host."""

    sandbox_id: SandboxId
    tenant: Tenant
    name: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Drain:
    """How far a drain has come: sandboxes that still run on the host, those on their way, and why some are not."""

    host: Host
    left: int
    moving: int
    stragglers: tuple[Straggler, ...] = ()


# The VMM's own memory beside the guest's: QEMU 7.2 with the devices of one sandbox stays below 160 MiB resident
# under KVM, and TCG's translation buffer (tb-size=256) comes on top.
VMM_BASE_OVERHEAD_MIB = 192
TCG_BUFFER_MIB = 256
VCPU_OVERHEAD_MIB = 8


def overhead_mib(resources: Resources, accelerator: Accelerator) -> int:
    """Memory in MiB that a sandbox's VMM may use beside its guest's; none where no VMM runs."""
    if accelerator is Accelerator.SIMULATED:
        return 0
    buffer = TCG_BUFFER_MIB if accelerator is Accelerator.TCG else 0
    return VMM_BASE_OVERHEAD_MIB + buffer + VCPU_OVERHEAD_MIB * resources.vcpus
