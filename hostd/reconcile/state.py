"""The values that decisions and drivers share: what a sandbox needs of the host, and what the host finds. PURE."""

from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address

from fleet.model.host import Accelerator
from fleet.model.ids import Digest, SandboxId


class DomainState(StrEnum):
    """What libvirt says of a sandbox's domain; ABSENT when it knows none."""

    ABSENT = "absent"
    RUNNING = "running"
    PAUSED = "paused"
    # Neither runs nor can run on: crashed, shut off, or in a state this version does not know.
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class BootFiles:
    """The verified files of an image on this host, as absolute paths, and the kernel command line it wants."""

    digest: Digest
    kernel: str
    initramfs: str
    root: str
    cmdline: str


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """A source as a read-only disk: its serial in the guest ("source-0") and the EROFS file behind it."""

    serial: str
    path: str


@dataclass(frozen=True, slots=True)
class Port:
    """A sandbox's place on the bridge: everything else that claims to come from its tap is dropped."""

    sandbox_id: SandboxId
    mac: str
    address: IPv4Address
    prefix_length: int

    @property
    def tap(self) -> str:
        """The tap's name; 15 characters, Linux's limit."""
        return tap_name(self.sandbox_id)


@dataclass(frozen=True, slots=True)
class Machine:
    """One sandbox's VM, complete: a domain is rendered from this and nothing else. Paths are absolute."""

    sandbox_id: SandboxId
    tenant: str
    vcpus: int
    memory_mib: int
    overhead_mib: int
    accelerator: Accelerator
    boot: BootFiles
    scratch_path: str
    link_path: str
    console_path: str
    generation_id: str
    source_disks: tuple[SourceDisk, ...] = ()
    port: Port | None = None


@dataclass(frozen=True, slots=True)
class ObservedNetwork:
    """Which sandboxes have a tap, and which have rules, on this host."""

    taps: frozenset[SandboxId] = frozenset()
    chains: frozenset[SandboxId] = frozenset()


@dataclass(frozen=True, slots=True)
class Observed:
    """What one pass finds on the host, by sandbox."""

    domains: dict[SandboxId, DomainState] = field(default_factory=dict)
    network: ObservedNetwork = ObservedNetwork()
    scratch_disks: frozenset[SandboxId] = frozenset()
    folders: frozenset[SandboxId] = frozenset()
    links: frozenset[SandboxId] = frozenset()

    def sandbox_ids(self) -> frozenset[SandboxId]:
        """Every sandbox of which something is on this host."""
        return frozenset(self.domains) | self.network.taps | self.network.chains | self.scratch_disks | self.folders


TAP_PREFIX = "bp-"


def tap_name(sandbox_id: SandboxId) -> str:
    """The name of a sandbox's tap."""
    return TAP_PREFIX + sandbox_id


def mac_address(address: IPv4Address) -> str:
    """The locally administered MAC that belongs to an address: unique on the bridge because the address is."""
    return "52:bd:" + ":".join(f"{byte:02x}" for byte in address.packed)
