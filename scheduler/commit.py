"""Writes decisions in groups: IF this scheduler leads AND nothing that a decision read has moved THEN all of the group, else none.

A lost race is no error: the caller looks again and decides again. What is written under which condition:

    placement   record, id, reservation,
                assignment unmoved              -> assignment, id (again), reservation, no refusal; a further run's likewise
    order       record, assignment unmoved      -> assignment
    removal     record, assignment unmoved      -> no record, name, id, assignment, refusal; a tombstone
    repair      reservation unmoved             -> reservation
    refusal     record, refusal unmoved         -> refusal
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from fleet.codec import encode
from fleet.errors import ConflictError
from fleet.model.assignment import Assignment, Refusal
from fleet.model.host import Reservation
from fleet.model.ids import HostId
from fleet.store.keyspace import (
    assignment_key,
    cordon_key,
    id_key,
    name_key,
    record_key,
    refusal_key,
    reservation_key,
    tombstone_key,
)
from fleet.store.port import TRANSACTION_OPS_MAX, VALUE_BYTES_MAX, Committed, Delete, Put, Store, Unmoved, Write
from scheduler.placement.lifecycle import Dismissal, LifecycleChange, Order, Removal
from scheduler.placement.plan import Plan
from scheduler.placement.snapshot import Snapshot, add, growth, reserved

# etcd refuses requests past 1.5 MiB; one value may be VALUE_BYTES_MAX, and a group stays below twice that with its keys.
GROUP_BYTES_MAX = VALUE_BYTES_MAX
# A destroyed id stays taken for one to two times as long: far longer than any client retries a creation.
TOMBSTONE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Change:
    """What stands or falls together: the keys that must not have moved, and the writes."""

    unmoved: tuple[str, ...]
    writes: tuple[Write, ...]


class Committer:
    """The one writer of assignments, reservations, refusals and tombstones."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._tombstone_lease = 0
        self._lease_until_s = -math.inf

    async def commit(self, fence: Unmoved, snapshot: Snapshot, changes: Iterable[Change]) -> Committed:
        """Writes `changes`, decided on `snapshot`, group by group until one loses its race; tells the last group's outcome."""
        revisions = dict(snapshot.mod_revisions)
        outcome = Committed(is_committed=True, revision=snapshot.revision)
        for group in _group(changes):
            conditions = [Unmoved(key, revisions.get(key, 0)) for key in group.unmoved if key != fence.key]
            outcome = await self._transact([fence, *conditions], group.writes)
            if not outcome.is_committed:
                return outcome
            # Later groups may rely on what this one wrote.
            for write in group.writes:
                revisions[write.key] = 0 if isinstance(write, Delete) else outcome.revision
        return outcome

    async def tombstone_lease(self) -> int:
        """The lease under which destroyed ids are kept: one for all of an hour's, never renewed."""
        if self._clock() >= self._lease_until_s:
            self._tombstone_lease = await self._store.grant_lease(2 * TOMBSTONE_S)
            self._lease_until_s = self._clock() + TOMBSTONE_S
        return self._tombstone_lease

    async def _transact(self, conditions: list[Unmoved], writes: list[Write]) -> Committed:
        try:
            return await self._store.transact(conditions, writes)
        except ConflictError:
            # The one lease in our writes has ended before its time: the next look takes a new one.
            self._lease_until_s = self._clock()
            raise


def lifecycle_changes(snapshot: Snapshot, due: Iterable[LifecycleChange], lease_id: int) -> Iterator[Change]:
    """Orders, removals and withdrawals as writes; `lease_id` holds the tombstones."""
    for one in due:
        match one:
            case Order(assignment):
                keys = (_record_of(assignment), assignment_key(assignment.host_id, assignment.sandbox_id))
                yield Change(keys, (Put(keys[1], encode(assignment)),))
            case Dismissal(assignment):
                keys = (_record_of(assignment), assignment_key(assignment.host_id, assignment.sandbox_id))
                yield Change(keys, (Delete(keys[1]),))
            case Removal():
                yield _remove(snapshot, one, lease_id)
            case _:
                key = refusal_key(one.sandbox_id)
                yield Change((key,), (Delete(key),))


def repair_changes(repairs: Iterable[Reservation]) -> Iterator[Change]:
    """Reservations as they must be."""
    for reservation in repairs:
        key = reservation_key(reservation.host_id)
        yield Change((key,), (Put(key, encode(reservation)),))


def plan_changes(snapshot: Snapshot, plan: Plan) -> Iterator[Change]:
    """A plan's assignments with the reservations they lead to, and those refusals that say something new."""
    sums = reserved(snapshot)
    for assignment in plan.assignments:
        sums[assignment.host_id] = add(_sum_of(sums, assignment.host_id), growth(snapshot, assignment))
        yield _place(snapshot, assignment, sums[assignment.host_id])
    for refusal in plan.refusals:
        if is_news(refusal, snapshot.refusals.get(refusal.sandbox_id)):
            key = refusal_key(refusal.sandbox_id)
            record = snapshot.records[refusal.sandbox_id]
            yield Change((record_key(record.tenant, record.sandbox_id), key), (Put(key, encode(refusal)),))


def is_news(refusal: Refusal, known: Refusal | None) -> bool:
    """Whether a refusal says something that the known one does not; a later time alone is nothing new."""
    return known is None or replace(refusal, at_ms=0) != replace(known, at_ms=0)


def _place(snapshot: Snapshot, assignment: Assignment, reservation: Reservation) -> Change:
    claim = id_key(assignment.sandbox_id)
    fence = reservation_key(assignment.host_id)
    order = assignment_key(assignment.host_id, assignment.sandbox_id)
    writes: list[Write] = [
        Put(order, encode(assignment)),
        Put(claim, assignment.tenant.encode()),
        Put(fence, encode(reservation)),
    ]
    if assignment.sandbox_id in snapshot.refusals:
        writes.append(Delete(refusal_key(assignment.sandbox_id)))
    unmoved = (_record_of(assignment), claim, fence, order, cordon_key(assignment.host_id))
    return Change(unmoved, tuple(writes))


def _remove(snapshot: Snapshot, removal: Removal, lease_id: int) -> Change:
    sandbox_id, owner = removal.sandbox_id, removal.record or removal.assignment
    assert owner is not None
    keys = [record_key(owner.tenant, sandbox_id), id_key(sandbox_id), refusal_key(sandbox_id)]
    if removal.assignment is not None:
        keys.append(assignment_key(removal.assignment.host_id, sandbox_id))
    # The name may belong to a younger sandbox when this one's record was gone before.
    if snapshot.names.get((owner.tenant, owner.spec.name)) == sandbox_id:
        keys.append(name_key(owner.tenant, owner.spec.name))
    writes: list[Write] = [Delete(key) for key in keys]
    writes.append(Put(tombstone_key(sandbox_id), owner.tenant.encode(), lease_id))
    return Change(tuple(keys), tuple(writes))


def _record_of(assignment: Assignment) -> str:
    return record_key(assignment.tenant, assignment.sandbox_id)


def _sum_of(sums: dict[HostId, Reservation], host_id: HostId) -> Reservation:
    return sums.get(host_id, Reservation(host_id))


@dataclass(slots=True)
class _Group:
    """Changes that go into one transaction; a key written twice keeps the later write."""

    conditions: dict[str, None]
    pending: dict[str, Write]

    @property
    def unmoved(self) -> list[str]:
        return list(self.conditions)

    @property
    def writes(self) -> list[Write]:
        return list(self.pending.values())

    def fits(self, change: Change) -> bool:
        """Whether `change` fits in as well, with one condition kept free for the fence."""
        conditions = len(self.conditions.keys() | set(change.unmoved))
        writes = {**self.pending, **{write.key: write for write in change.writes}}
        size_bytes = sum(len(write.value) for write in writes.values() if isinstance(write, Put))
        return max(conditions + 1, len(writes)) <= TRANSACTION_OPS_MAX and size_bytes <= GROUP_BYTES_MAX

    def take(self, change: Change) -> None:
        """Adds `change`."""
        self.conditions.update(dict.fromkeys(change.unmoved))
        self.pending.update({write.key: write for write in change.writes})


def _group(changes: Iterable[Change]) -> Iterator[_Group]:
    group = _Group({}, {})
    for change in changes:
        if group.pending and not group.fits(change):
            yield group
            group = _Group({}, {})
        group.take(change)
    if group.pending:
        yield group
