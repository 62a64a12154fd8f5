"""What the scheduler decides on: everything in the store at one revision, decoded. PURE."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fleet.model.assignment import Assignment, Refusal
from fleet.model.host import Capacity, HostCordon, HostRecord, Reservation
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import ENDED_PHASES, Goal, Phase, SandboxRecord, SandboxStatus


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The store at `revision`; `mod_revisions` has every key's, so that a commit can tell whether what it read has moved.

    `opaque_sandboxes` and `opaque_hosts` are those of which a record or an assignment is there but cannot be read, for example
    because a newer scheduler wrote it: nothing is decided about them.
    """

    revision: int = 0
    records: Mapping[SandboxId, SandboxRecord] = field(default_factory=dict)
    names: Mapping[tuple[Tenant, str], SandboxId] = field(default_factory=dict)
    assignments: Mapping[SandboxId, Assignment] = field(default_factory=dict)
    statuses: Mapping[tuple[HostId, SandboxId], SandboxStatus] = field(default_factory=dict)
    refusals: Mapping[SandboxId, Refusal] = field(default_factory=dict)
    hosts: Mapping[HostId, HostRecord] = field(default_factory=dict)
    alive: frozenset[HostId] = frozenset()
    cordons: Mapping[HostId, HostCordon] = field(default_factory=dict)
    reservations: Mapping[HostId, Reservation] = field(default_factory=dict)
    sources: Mapping[tuple[Tenant, Digest], frozenset[HostId]] = field(default_factory=dict)
    opaque_sandboxes: frozenset[SandboxId] = frozenset()
    opaque_hosts: frozenset[HostId] = frozenset()
    mod_revisions: Mapping[str, int] = field(default_factory=dict)

    def status_of(self, assignment: Assignment) -> SandboxStatus | None:
        """What the assignment's host publishes about its sandbox."""
        return self.statuses.get((assignment.host_id, assignment.sandbox_id))

    def assignment_of(self, record: SandboxRecord) -> Assignment | None:
        """The order that carries out `record`'s wish."""
        found = self.assignments.get(record.sandbox_id)
        return found if found is not None and found.tenant == record.tenant else None

    def pending(self) -> list[SandboxRecord]:
        """Sandboxes that shall run and wait for room, on any host or for a further run on their own; the oldest first."""
        found = [record for record in self.records.values() if self._is_pending(record)]
        return sorted(found, key=lambda record: (record.created_at_ms, record.sandbox_id))

    def is_resuming(self, record: SandboxRecord) -> bool:
        """Whether `record` waits for room for its next run, on the host that has its disk."""
        assignment = self.assignment_of(record)
        return record.goal is Goal.RUN and assignment is not None and assignment.run < record.run

    def _is_pending(self, record: SandboxRecord) -> bool:
        if record.goal is not Goal.RUN or record.sandbox_id in self.opaque_sandboxes:
            return False
        return record.sandbox_id not in self.assignments or self.is_resuming(record)


def share_of(assignment: Assignment) -> Reservation:
    """What one assignment sets aside on its host while its sandbox runs, or may."""
    resources = assignment.spec.resources
    memory_mib = resources.memory_mib + assignment.overhead_mib
    return Reservation(assignment.host_id, resources.vcpus, memory_mib, resources.disk_mib, 1)


def set_aside(assignment: Assignment, status: SandboxStatus | None) -> Reservation:
    """What one assignment sets aside by what its host says: all, or a stopped sandbox's disk and place, or nothing.

    A status of an earlier run says nothing about the run that is ordered, and what starts or runs has released nothing.
    """
    is_over = status is not None and status.phase in (*ENDED_PHASES, Phase.REMOVING) and status.released
    if status is None or not is_over or status.run < assignment.run:
        return share_of(assignment)
    if status.phase is Phase.STOPPED:
        return Reservation(assignment.host_id, disk_mib=assignment.spec.resources.disk_mib, sandboxes=1)
    return Reservation(assignment.host_id)


def add(reservation: Reservation, share: Reservation) -> Reservation:
    """`reservation` with `share` set aside as well."""
    return Reservation(
        reservation.host_id,
        reservation.vcpus + share.vcpus,
        reservation.memory_mib + share.memory_mib,
        reservation.disk_mib + share.disk_mib,
        reservation.sandboxes + share.sandboxes,
    )


def growth(snapshot: Snapshot, assignment: Assignment) -> Reservation:
    """By how much `assignment`, not written yet, grows what is set aside: a further run has its disk and its place already."""
    share, known = share_of(assignment), snapshot.assignments.get(assignment.sandbox_id)
    if known is None or known.host_id != assignment.host_id:
        return share
    held = set_aside(known, snapshot.status_of(known))
    return Reservation(
        assignment.host_id,
        share.vcpus - held.vcpus,
        share.memory_mib - held.memory_mib,
        share.disk_mib - held.disk_mib,
        share.sandboxes - held.sandboxes,
    )


def free_of(capacity: Capacity, reservation: Reservation) -> Capacity:
    """What is left of a host; below zero where its capacity has shrunk under what it carries."""
    return Capacity(
        capacity.vcpus - reservation.vcpus,
        capacity.memory_mib - reservation.memory_mib,
        capacity.disk_mib - reservation.disk_mib,
        capacity.sandboxes - reservation.sandboxes,
    )


def reserved(snapshot: Snapshot) -> dict[HostId, Reservation]:
    """What each host's assignments set aside in truth: the sum over all of them."""
    sums: dict[HostId, Reservation] = {}
    for assignment in snapshot.assignments.values():
        known = sums.get(assignment.host_id, Reservation(assignment.host_id))
        sums[assignment.host_id] = add(known, set_aside(assignment, snapshot.status_of(assignment)))
    return sums


def repairs(snapshot: Snapshot) -> tuple[Reservation, ...]:
    """The reservations that are not what they must be, as they must be."""
    return tuple(_repairs(snapshot))


def _repairs(snapshot: Snapshot) -> Iterator[Reservation]:
    sums = reserved(snapshot)
    for host_id in sorted((set(snapshot.hosts) | set(snapshot.reservations) | set(sums)) - snapshot.opaque_hosts):
        nothing = Reservation(host_id)
        if sums.get(host_id, nothing) != snapshot.reservations.get(host_id, nothing):
            yield sums.get(host_id, nothing)
