"""A host as the store has it, and what a sandbox takes of one. PURE."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleet.model.assignment import ANY_NODE, GpuShare
from fleet.model.host import HostLosses, HostRecord, NumaNode, Reservation
from fleet.model.ids import Tenant
from fleet.model.sandbox import Amounts
from scheduler.placement.demand import NO_TENANT, VCPU_MILLI

# What excludes a host by itself, in the order of the filters; the first that holds counts.
OPEN, UNREADABLE, DEAD, CORDONED, BACKING_OFF = range(5)
# The label by which hosts are near each other.
RACK_LABEL = "rack"
NO_RACK = ""
# What a host says of itself counts no further than this: past any server (a million cores, an exbibyte), and sums stay in 63 bits.
AMOUNT_MAX = 2**40


@dataclass(frozen=True, slots=True)
class HostView:
    """A host as the store has it: its registration, how it is, and what is set aside on it."""

    record: HostRecord
    is_alive: bool = True
    is_readable: bool = True
    is_cordoned: bool = False
    is_backing_off: bool = False
    reserved: Reservation | None = None
    tenant_counts: Mapping[Tenant, int] = field(default_factory=dict)
    losses: HostLosses | None = None
    numa_used: tuple[NumaNode, ...] = ()

    @property
    def status(self) -> int:
        """OPEN, or the first of what excludes it."""
        closed = (not self.is_readable, not self.is_alive, self.is_cordoned, self.is_backing_off)
        return closed.index(True) + 1 if True in closed else OPEN


@dataclass(frozen=True, slots=True)
class Share:
    """What one sandbox takes of a host; memory with its VMM's, devices by their ids."""

    vcpu_milli: int = 0
    memory_mib: int = 0
    disk_mib: int = 0
    sandboxes: int = 0
    gpus: tuple[GpuShare, ...] = ()
    numa_node: int = ANY_NODE
    tenant: Tenant = NO_TENANT


def vcpu_milli_of(vcpus: int, overcommit_milli: int) -> int:
    """Thousandths of CPUs that so many CPUs are sold as."""
    return min(vcpus * overcommit_milli * VCPU_MILLI // 1000, AMOUNT_MAX)


def sellable_of(record: HostRecord) -> Amounts:
    """What a host offers, with its CPUs' overcommit; what it says past AMOUNT_MAX is not believed."""
    capacity = record.capacity
    vcpus = capacity.vcpus * record.vcpu_overcommit_milli // 1000
    return Amounts(
        min(vcpus, AMOUNT_MAX),
        min(capacity.memory_mib, AMOUNT_MAX),
        min(capacity.disk_mib, AMOUNT_MAX),
        1000 * len(record.gpus),
        min(capacity.sandboxes, AMOUNT_MAX),
    )


def share_of_reservation(reservation: Reservation) -> Share:
    """The share that a reservation is."""
    return Share(
        reservation.vcpus * VCPU_MILLI,
        reservation.memory_mib,
        reservation.disk_mib,
        reservation.sandboxes,
        reservation.gpus,
    )
