"""What the scheduler decides on: everything in the store at one revision, decoded, with the sums that follow from it. PURE.

The scheduler's own snapshot is a view that moves on with the store: it is read without awaiting in between.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fleet.model.assignment import Assignment, GpuShare, Refusal
from fleet.model.budget import ROOT_ACCOUNT, Balance, Budget, Charged, Meter, Prices
from fleet.model.host import Capacity, HostCordon, HostLosses, HostRecord, Reservation
from fleet.model.ids import NO_SANDBOX, Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import (
    ENDED_PHASES,
    Amounts,
    Goal,
    Phase,
    Resources,
    SandboxRecord,
    SandboxStatus,
    StageName,
    Totals,
)
from scheduler.budget.accounts import Account, is_kept, sandbox_account
from scheduler.budget.balance import add_amounts, subtract_amounts, unbalanced
from scheduler.placement.hosts import sellable_of

# Why a sandbox has left a host, or ended with it: a code of reasons.
HOST_LOST = "host_lost"

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The store at `revision`; `mod_revisions` has every key's, so that a commit can tell whether what it read has moved.

    `assignments` has each sandbox's newest placement; older ones, which are being removed, are `remnants`.
    `opaque_sandboxes` and `opaque_hosts` are those of which a record or an assignment is there but cannot be read, for example
    because a newer scheduler wrote it: nothing is decided about them. `digest` tells one content of the store from every other.
    """

    revision: int = 0
    records: Mapping[SandboxId, SandboxRecord] = field(default_factory=dict)
    names: Mapping[tuple[Tenant, str], SandboxId] = field(default_factory=dict)
    assignments: Mapping[SandboxId, Assignment] = field(default_factory=dict)
    remnants: Mapping[tuple[HostId, SandboxId], Assignment] = field(default_factory=dict)
    statuses: Mapping[tuple[HostId, SandboxId], SandboxStatus] = field(default_factory=dict)
    refusals: Mapping[SandboxId, Refusal] = field(default_factory=dict)
    hosts: Mapping[HostId, HostRecord] = field(default_factory=dict)
    alive: AbstractSet[HostId] = frozenset()
    cordons: Mapping[HostId, HostCordon] = field(default_factory=dict)
    losses: Mapping[HostId, HostLosses] = field(default_factory=dict)
    reservations: Mapping[HostId, Reservation] = field(default_factory=dict)
    budgets: Mapping[Account, Budget] = field(default_factory=dict)
    balances: Mapping[Account, Balance] = field(default_factory=dict)
    meters: Mapping[HostId, Meter] = field(default_factory=dict)
    charged: Mapping[HostId, Charged] = field(default_factory=dict)
    prices: Prices = field(default_factory=Prices)
    sources: Mapping[tuple[Tenant, Digest], AbstractSet[HostId]] = field(default_factory=dict)
    opaque_sandboxes: AbstractSet[SandboxId] = frozenset()
    opaque_hosts: AbstractSet[HostId] = frozenset()
    mod_revisions: Mapping[str, int] = field(default_factory=dict)
    digest: str = ""
    kept: "Sums | None" = None

    @property
    def sums(self) -> "Sums":
        """What follows from the rest; made anew where nobody keeps it."""
        return self.kept if self.kept is not None else Sums.of(self)

    @property
    def reserved_by_host(self) -> Mapping[HostId, Reservation]:
        """What each host's assignments set aside in truth; a host of which nothing is set aside is not in it."""
        return self.sums.reserved_by_host

    @property
    def reserved_by_account(self) -> Mapping[Account, Amounts]:
        """What each account, with all below it, has set aside in truth; one of which nothing is set aside is not in it."""
        return self.sums.reserved_by_account

    @property
    def children(self) -> Mapping[SandboxId, AbstractSet[SandboxId]]:
        """The sandboxes that each sandbox has started and that are not removed."""
        return self.sums.children

    def status_of(self, assignment: Assignment) -> SandboxStatus | None:
        """What the assignment's host publishes about its sandbox, in this placement."""
        status = self.statuses.get((assignment.host_id, assignment.sandbox_id))
        return status if status is not None and _is_of(status, assignment) else None

    def remains_of(self, sandbox_id: SandboxId) -> frozenset[HostId]:
        """The hosts that have something of an earlier placement: no further one goes there."""
        record, found = self.records.get(sandbox_id), self.assignments.get(sandbox_id)
        if record is None or record.placement <= 1:
            return frozenset()
        hosts = {host_id for host_id, other in self.remnants if other == sandbox_id}
        if found is not None and found.placement < record.placement:
            hosts.add(found.host_id)
        return frozenset(hosts)

    def is_backing_off(self, host_id: HostId, now_ms: int) -> bool:
        """Whether a host was lost of late and has not stayed for long enough since."""
        losses = self.losses.get(host_id)
        return losses is not None and (losses.until_ms == 0 or now_ms < losses.until_ms)

    def assignment_of(self, record: SandboxRecord) -> Assignment | None:
        """The order that carries out `record`'s wish; None where it shall have another placement first."""
        found = self.assignments.get(record.sandbox_id)
        if found is None or found.tenant != record.tenant or found.placement < record.placement:
            return None
        return found

    def pending(self) -> list[SandboxRecord]:
        """Sandboxes that shall run and wait for room, on any host or for a further run on their own; the oldest first."""
        found = [self.records[sandbox_id] for sandbox_id in self.sums.pending]
        return sorted(found, key=lambda record: (record.created_at_ms, record.sandbox_id))

    def is_resuming(self, record: SandboxRecord) -> bool:
        """Whether `record` waits for room for its next run, on the host that has its disk."""
        assignment = self.assignment_of(record)
        return record.goal is Goal.RUN and assignment is not None and assignment.run < record.run

    def is_pending(self, record: SandboxRecord) -> bool:
        """Whether `record` shall run and waits for room."""
        if record.goal is not Goal.RUN or record.sandbox_id in self.opaque_sandboxes:
            return False
        assignment = self.assignments.get(record.sandbox_id)
        return assignment is None or assignment.placement < record.placement or self.is_resuming(record)


class Sums:
    """What follows from a snapshot's parts, kept up with each change of one: no look at it costs more for more sandboxes.

    `pending` are the sandboxes that wait for room; `misreserved` are the hosts whose reservation is not the sum it must be;
    `uncharged` are those whose meter is newer than what of it was charged; `device_hosts` have GPUs; `capacity` is
    what all registered hosts can sell.
    """

    def __init__(self) -> None:
        self.reserved_by_host: dict[HostId, Reservation] = {}
        self.reserved_by_tenant: dict[Tenant, Amounts] = {}
        self.reserved_by_account: dict[Account, Amounts] = {}
        self.members: dict[Account, set[tuple[HostId, SandboxId]]] = {}
        self.unbalanced: set[Account] = set()
        self.lapsed: set[Account] = set()
        self.limited: set[Account] = set()
        self.tenants_on: dict[HostId, dict[Tenant, int]] = {}
        self.sandboxes_on: dict[HostId, set[SandboxId]] = {}
        self.records_of: dict[Tenant, int] = {}
        self.resources_of: dict[Resources, int] = {}
        self.device_hosts: set[HostId] = set()
        self.capacity = Amounts()
        self._sold: dict[HostId, Amounts] = {}
        self.children: dict[SandboxId, set[SandboxId]] = {}
        self.groups: dict[tuple[Tenant, str], set[SandboxId]] = {}
        self.priorities: dict[int, int] = {}
        self.pending: set[SandboxId] = set()
        self.misreserved: set[HostId] = set()
        self.uncharged: set[HostId] = set()

    @staticmethod
    def of(snapshot: Snapshot) -> "Sums":
        """The sums of a snapshot, made anew."""
        sums = Sums()
        for record in snapshot.records.values():
            sums.count_record(record, 1)
            sums.set_pending(record.sandbox_id, is_pending=snapshot.is_pending(record))
        for assignment in (*snapshot.assignments.values(), *snapshot.remnants.values()):
            sums.set_assigned(assignment.host_id, assignment.sandbox_id, is_assigned=True)
            sums.set_paying(assignment, is_assigned=True)
            sums.shift(assignment, Reservation(assignment.host_id), _held(snapshot, assignment))
        for host_id in {*snapshot.hosts, *snapshot.reservations, *sums.reserved_by_host}:
            sums.check_host(snapshot, host_id)
        for host_id in snapshot.meters:
            sums.check_meter(snapshot, host_id)
        # Of its own the snapshot would make its sums anew for the question.
        sums.check_accounts(replace(snapshot, kept=sums), {*snapshot.balances, *sums.reserved_by_account})
        return sums

    def shift(self, order: Assignment, before: Reservation, after: Reservation) -> None:
        """An order sets aside `after` where it set aside `before`."""
        if before == after:
            return
        host_id, tenant = after.host_id, order.tenant
        growth = subtract_amounts(amounts_of(order, after), amounts_of(order, before))
        for name in accounts_of(order):
            held_by = add_amounts(self.reserved_by_account.get((tenant, name), Amounts()), growth)
            _keep(self.reserved_by_account, (tenant, name), held_by, is_empty=held_by == Amounts())
        change = subtract(after, before)
        total = add(self.reserved_by_host.get(host_id, Reservation(host_id)), change)
        _keep(self.reserved_by_host, host_id, total, is_empty=total == Reservation(host_id))
        held = _add_amounts(self.reserved_by_tenant.get(tenant, Amounts()), change)
        _keep(self.reserved_by_tenant, tenant, held, is_empty=held == Amounts())
        if change.sandboxes:
            counts = self.tenants_on.setdefault(host_id, {})
            _count(counts, tenant, change.sandboxes)
            _keep(self.tenants_on, host_id, counts, is_empty=not counts)

    def set_assigned(self, host_id: HostId, sandbox_id: SandboxId, *, is_assigned: bool) -> None:
        """Whether a host has an order for a sandbox, also one that is being removed."""
        _join(self.sandboxes_on, host_id, sandbox_id, is_in=is_assigned)

    def set_paying(self, order: Assignment, *, is_assigned: bool) -> None:
        """Whether an order counts in its accounts."""
        for name in accounts_of(order):
            _join(self.members, (order.tenant, name), (order.host_id, order.sandbox_id), is_in=is_assigned)

    def check_accounts(self, snapshot: Snapshot, accounts: Iterable[Account]) -> None:
        """Looks again whether balances are the sums they must be."""
        found = set(accounts)
        self.unbalanced -= found
        self.unbalanced |= set(unbalanced(snapshot, found))
        self.lapsed -= found
        self.lapsed |= {account for account in found if account in snapshot.balances and not is_kept(snapshot, account)}

    def count_record(self, record: SandboxRecord, sign: int) -> None:
        """A record has come (1) or gone (-1)."""
        _count(self.records_of, record.tenant, sign)
        _count(self.resources_of, record.spec.resources, sign)
        _count(self.priorities, record.spec.placement.priority, sign)
        if record.spec.placement.group:
            _join(self.groups, (record.tenant, record.spec.placement.group), record.sandbox_id, is_in=sign > 0)
        if record.spec.limits.total != Totals():
            _member(self.limited, (record.tenant, sandbox_account(record.sandbox_id)), is_in=sign > 0)
        if record.spec.parent != NO_SANDBOX:
            _join(self.children, record.spec.parent, record.sandbox_id, is_in=sign > 0)

    def set_pending(self, sandbox_id: SandboxId, *, is_pending: bool) -> None:
        """Whether a sandbox waits for room."""
        _member(self.pending, sandbox_id, is_in=is_pending)

    def check_host(self, snapshot: Snapshot, host_id: HostId) -> None:
        """Looks again whether a host has devices, and whether its reservation is the sum it must be."""
        nothing = Reservation(host_id)
        host = snapshot.hosts.get(host_id)
        _member(self.device_hosts, host_id, is_in=host is not None and bool(host.gpus))
        sold = sellable_of(host) if host is not None else Amounts()
        self.capacity = _exchange(self.capacity, self._sold.get(host_id, Amounts()), sold)
        _keep(self._sold, host_id, sold, is_empty=host is None)
        said, true = snapshot.reservations.get(host_id, nothing), self.reserved_by_host.get(host_id, nothing)
        _member(self.misreserved, host_id, is_in=said != true and host_id not in snapshot.opaque_hosts)

    def check_meter(self, snapshot: Snapshot, host_id: HostId) -> None:
        """Looks again whether a host's meter is charged."""
        meter, charged = snapshot.meters.get(host_id), snapshot.charged.get(host_id)
        # Also one that went back: a host that has lost its state counts its periods anew.
        is_due = meter is not None and (charged is None or charged.period != meter.period)
        _member(self.uncharged, host_id, is_in=is_due)


def accounts_of(assignment: Assignment) -> tuple[str, ...]:
    """Whose budgets an order counts in; the tenant's own where a scheduler that knew no budgets wrote it.

    What a lost host has left counts in none: the host has ended it, and may never come back to say so.
    """
    return () if is_left_behind(assignment) else assignment.accounts or (ROOT_ACCOUNT,)


def is_left_behind(assignment: Assignment) -> bool:
    """Whether it was ordered away, or to its end, because its host was lost."""
    reason = assignment.reason
    return assignment.goal is not Goal.RUN and reason is not None and reason.code == HOST_LOST


def amounts_of(assignment: Assignment, share: Reservation) -> Amounts:
    """What an order counts for in budgets while it sets aside `share`: as its owner asked, without its VMM's overhead."""
    memory_mib = assignment.spec.resources.memory_mib if share.memory_mib else 0
    gpu_milli = sum(one.milli for one in share.gpus)
    return Amounts(share.vcpus, memory_mib, share.disk_mib, gpu_milli, share.sandboxes)


def share_of(assignment: Assignment) -> Reservation:
    """What one assignment sets aside on its host while its sandbox runs, or may."""
    resources = assignment.spec.resources
    memory_mib = resources.memory_mib + assignment.overhead_mib
    host_id = assignment.host_id
    return Reservation(host_id, resources.vcpus, memory_mib, resources.disk_mib, 1, _merge((), assignment.gpus, 1))


def set_aside(assignment: Assignment, status: SandboxStatus | None) -> Reservation:
    """What one assignment sets aside by what its host says: all, or a stopped or leaving sandbox's disk and place, or nothing.

    A status of an earlier run says nothing about the run that is ordered, and what starts or runs has released nothing.
    """
    is_over = status is not None and status.phase in (*ENDED_PHASES, Phase.REMOVING) and status.released
    if status is None or not is_over or status.run < assignment.run or not _is_of(status, assignment):
        return share_of(assignment)
    if status.phase is Phase.STOPPED or (status.phase is Phase.REMOVING and _has_kept_disk(status)):
        return Reservation(assignment.host_id, disk_mib=assignment.spec.resources.disk_mib, sandboxes=1)
    return Reservation(assignment.host_id)


def _has_kept_disk(status: SandboxStatus) -> bool:
    return any(stage.name == StageName.DISK_KEPT for stage in status.stages)


def add(reservation: Reservation, share: Reservation) -> Reservation:
    """`reservation` with `share` set aside as well."""
    return _combine(reservation, share, 1)


def subtract(reservation: Reservation, share: Reservation) -> Reservation:
    """`reservation` without `share`; below zero where that is more."""
    return _combine(reservation, share, -1)


def growth(snapshot: Snapshot, assignment: Assignment) -> Reservation:
    """By how much `assignment`, not written yet, grows what is set aside: a further run has its disk and its place already."""
    share, known = share_of(assignment), snapshot.assignments.get(assignment.sandbox_id)
    if known is None or known.host_id != assignment.host_id:
        return share
    return subtract(share, set_aside(known, snapshot.status_of(known)))


def free_of(capacity: Capacity, reservation: Reservation) -> Capacity:
    """What is left of a host; below zero where its capacity has shrunk under what it carries."""
    return Capacity(
        capacity.vcpus - reservation.vcpus,
        capacity.memory_mib - reservation.memory_mib,
        capacity.disk_mib - reservation.disk_mib,
        capacity.sandboxes - reservation.sandboxes,
    )


def reserved(snapshot: Snapshot) -> dict[HostId, Reservation]:
    """What each host's assignments set aside in truth, as a copy: the sum over all of them."""
    return dict(snapshot.reserved_by_host)


def repairs(snapshot: Snapshot) -> tuple[Reservation, ...]:
    """The reservations that are not what they must be, as they must be."""
    sums = snapshot.sums
    return tuple(sums.reserved_by_host.get(host_id, Reservation(host_id)) for host_id in sorted(sums.misreserved))


def _is_of(status: SandboxStatus, assignment: Assignment) -> bool:
    # A hostd that knew no placements wrote none.
    return max(1, status.placement) == max(1, assignment.placement)


def _held(snapshot: Snapshot, assignment: Assignment) -> Reservation:
    return set_aside(assignment, snapshot.status_of(assignment))


def _combine(one: Reservation, other: Reservation, sign: int) -> Reservation:
    return Reservation(
        one.host_id,
        one.vcpus + sign * other.vcpus,
        one.memory_mib + sign * other.memory_mib,
        one.disk_mib + sign * other.disk_mib,
        one.sandboxes + sign * other.sandboxes,
        _merge(one.gpus, other.gpus, sign) if other.gpus else one.gpus,
    )


def _merge(one: tuple[GpuShare, ...], other: tuple[GpuShare, ...], sign: int) -> tuple[GpuShare, ...]:
    """The devices' sums in the order of their ids; one of which nothing is set aside is not in it."""
    if not one and not other:
        return ()
    millis = {share.device_id: share.milli for share in one}
    for share in other:
        millis[share.device_id] = millis.get(share.device_id, 0) + sign * share.milli
    return tuple(GpuShare(device_id, milli) for device_id, milli in sorted(millis.items()) if milli)


def _exchange(total: Amounts, old: Amounts, new: Amounts) -> Amounts:
    if old == new:
        return total
    return Amounts(
        total.vcpus - old.vcpus + new.vcpus,
        total.memory_mib - old.memory_mib + new.memory_mib,
        total.disk_mib - old.disk_mib + new.disk_mib,
        total.gpu_milli - old.gpu_milli + new.gpu_milli,
        total.sandboxes - old.sandboxes + new.sandboxes,
    )


def _add_amounts(held: Amounts, change: Reservation) -> Amounts:
    return Amounts(
        held.vcpus + change.vcpus,
        held.memory_mib + change.memory_mib,
        held.disk_mib + change.disk_mib,
        held.gpu_milli + sum(share.milli for share in change.gpus),
        held.sandboxes + change.sandboxes,
    )


def _keep(values: dict[K, V], key: K, value: V, *, is_empty: bool) -> None:
    if is_empty:
        values.pop(key, None)
    else:
        values[key] = value


def _count(counts: dict[K, int], key: K, change: int) -> None:
    total = counts.get(key, 0) + change
    _keep(counts, key, total, is_empty=not total)


def _member(members: set[K], one: K, *, is_in: bool) -> None:
    if is_in:
        members.add(one)
    else:
        members.discard(one)


def _join(groups: dict[K, set[V]], key: K, one: V, *, is_in: bool) -> None:
    group = groups.setdefault(key, set())
    _member(group, one, is_in=is_in)
    if not group:
        del groups[key]
