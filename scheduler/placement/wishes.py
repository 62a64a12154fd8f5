"""What a pending sandbox asks of the cluster, from its record and what the snapshot says of it. PURE."""

from collections.abc import Hashable
from dataclasses import dataclass

from fleet.model.assignment import Assignment
from fleet.model.ids import NO_HOST, NO_SANDBOX, HostId
from fleet.model.sandbox import ImageRef, SandboxRecord
from scheduler.placement.demand import Demand, Wish, demand_of
from scheduler.placement.hosts import NO_RACK, RACK_LABEL, Share, share_of_reservation
from scheduler.placement.snapshot import Snapshot, set_aside

# An image by its digest alone: a disk that is kept lies on that very one, whatever its tag says now.
ANY_NAME = ""


def resumed(snapshot: Snapshot, record: SandboxRecord) -> Assignment | None:
    """The order whose host has the record's disk, when it waits for room there; None when it may go anywhere."""
    return snapshot.assignment_of(record) if snapshot.is_resuming(record) else None


def demand_for(snapshot: Snapshot, record: SandboxRecord) -> Demand:
    """The request class; a further run needs the very image that its disk lies on."""
    known = resumed(snapshot, record)
    return demand_of(record.spec, ImageRef(ANY_NAME, known.image_digest) if known is not None else None)


def wish_of(snapshot: Snapshot, record: SandboxRecord) -> Wish:
    """What it alone wants: its sources, its parent's neighbourhood, no host that still removes an earlier placement."""
    known, parent = resumed(snapshot, record), snapshot.assignments.get(record.spec.parent)
    near = parent.host_id if parent is not None and record.spec.parent != NO_SANDBOX else NO_HOST
    return Wish(
        tenant=record.tenant,
        sources=tuple(source.digest for source in record.spec.sources),
        affinity=record.spec.placement.parent_affinity,
        parent_host=near,
        parent_rack=_rack_of(snapshot, near),
        avoid_hosts=frozenset(snapshot.remains_of(record.sandbox_id)) if known is None else frozenset(),
        pinned_host=known.host_id if known is not None else NO_HOST,
    )


@dataclass(frozen=True, slots=True)
class Ask:
    """What one waiting sandbox asks of the cluster; `known` is the order whose host has its disk, for a further run."""

    record: SandboxRecord
    known: Assignment | None
    demand: Demand
    wish: Wish

    @property
    def wants(self) -> Hashable:
        """All that filters look at; a further run has a room of its own to wait for, so it wants what nobody else does."""
        return (self.demand, self.wish.avoid_hosts) if self.known is None else self.record.sandbox_id


def ask_of(snapshot: Snapshot, record: SandboxRecord) -> Ask:
    """What `record` asks for, by what the snapshot says of it."""
    return Ask(record, resumed(snapshot, record), demand_for(snapshot, record), wish_of(snapshot, record))


def held_by(snapshot: Snapshot, assignment: Assignment) -> Share:
    """What an order has set aside on its host."""
    share = share_of_reservation(set_aside(assignment, snapshot.status_of(assignment)))
    node = assignment.numa_node if share.vcpu_milli else -1
    return Share(
        share.vcpu_milli, share.memory_mib, share.disk_mib, share.sandboxes, share.gpus, node, assignment.tenant
    )


def _rack_of(snapshot: Snapshot, host_id: HostId) -> str:
    host = snapshot.hosts.get(host_id)
    labels = host.labels if host is not None else ()
    return next((label.value for label in labels if label.name == RACK_LABEL), NO_RACK)
