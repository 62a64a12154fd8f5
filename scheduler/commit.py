"""Writes decisions in groups: IF this scheduler leads AND nothing that a decision read has moved THEN all of the group, else none.

A lost race is no error: the caller looks again and decides again. With a placement, a new refusal and a removal goes its event.
What is written under which condition:

    placement   record, id, reservation, cordon,
                alive, assignment, the balances
                of its accounts unmoved -> assignment, id (again), reservation, balances, no refusal; a further run's likewise
    creation    record, id, name, tombstone
                absent                  -> record, id, name, with its placement or its refusal
    order       record, assignment unmoved      -> assignment
    removal     record, assignment unmoved      -> no record, name, id, assignment, refusal; a tombstone, events that end
    repair      reservation unmoved             -> reservation
    refusal     record, refusal unmoved         -> refusal
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from fleet.codec import encode
from fleet.errors import ConflictError
from fleet.model.assignment import Assignment, Refusal
from fleet.model.budget import Balance
from fleet.model.host import Reservation
from fleet.model.ids import HostId, SandboxId, Tenant
from fleet.model.sandbox import SandboxRecord
from fleet.store.keyspace import (
    alive_key,
    assignment_key,
    balance_key,
    cordon_key,
    events_of,
    id_key,
    name_key,
    record_key,
    refusal_key,
    reservation_key,
    tombstone_key,
)
from fleet.store.port import (
    TRANSACTION_OPS_MAX,
    VALUE_BYTES_MAX,
    Committed,
    Delete,
    KeyValue,
    Put,
    Store,
    Unmoved,
    Write,
)
from scheduler import events
from scheduler.budget.journal import Books
from scheduler.placement.lifecycle import Dismissal, LifecycleChange, Order, Removal
from scheduler.placement.plan import Plan
from scheduler.placement.snapshot import Snapshot, add, growth, reserved
from scheduler.quotas import CYCLES_KEPT_S
from scheduler.submissions import Submission

# etcd refuses requests past 1.5 MiB; one value may be VALUE_BYTES_MAX, and a group stays below twice that with its keys.
GROUP_BYTES_MAX = VALUE_BYTES_MAX
# A destroyed id stays taken for one to two times as long: far longer than any client retries a creation.
TOMBSTONE_S = 3600.0
# A removed sandbox's events are kept seven days at least, under a lease that all of a day's removals share.
EVENTS_LEASE_DAY_S = 24 * 3600.0
EVENTS_KEPT_S = 8 * EVENTS_LEASE_DAY_S
# Removed sandboxes of one tenant in a day whose events are kept: with eight events each, some 6 MB in the store. Of those past that
# only the removal is told, for as long as the id is taken.
HISTORIES_MAX = 2000
# A thousand sandboxes that are removed at once are read in a fraction of a second, and the store has other callers.
READS_AT_ONCE = 32
NOTHING: Mapping[SandboxId, Submission] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Change:
    """What stands or falls together: the keys that must not have moved since it was decided, and the writes.

    With a `removal` the writes are not all there yet: `Committer.complete` adds what the sandbox leaves behind. `about` is the
    sandbox of a placement or a refusal; `values` are what some of the written keys stand for.
    """

    unmoved: tuple[Unmoved, ...]
    writes: tuple[Write, ...]
    removal: Removal | None = None
    about: SandboxId | None = None
    values: tuple[tuple[str, object], ...] = ()


Told = Callable[["Sequence[Change]", Committed], None]


@dataclass(frozen=True, slots=True)
class Departure:
    """When a sandbox is removed, its place among the changes, and the leases of what it leaves; `is_past` HISTORIES_MAX."""

    now_ms: int
    place: int
    tombstone_lease: int
    event_lease: int
    is_past: bool


class Committer:
    """The one writer of assignments, reservations, refusals and tombstones; `revision` is that of its last write."""

    def __init__(self, store: Store, clock: Callable[[], float], cycles_kept_s: float = CYCLES_KEPT_S) -> None:
        self._store = store
        self._cycles = _SharedLease(store, clock, cycles_kept_s, 2 * cycles_kept_s)
        self.cycle_lease = 0
        self.revision = 0
        self._tombstones = _SharedLease(store, clock, TOMBSTONE_S, 2 * TOMBSTONE_S)
        self._histories = _SharedLease(store, clock, EVENTS_LEASE_DAY_S, EVENTS_KEPT_S)
        self._kept: dict[Tenant, set[SandboxId]] = {}
        self._kept_under = 0

    async def prepare(self) -> None:
        """Sees to it that there is a `cycle_lease`, under which the records of cycles are put."""
        self.cycle_lease = await self._cycles.current()

    async def commit(self, fence: Unmoved, changes: Sequence[Change], told: Told | None = None) -> Committed:
        """Writes `changes` group by group until one loses its race; tells the last group's outcome, of revision 0 if there is none.

        Later groups may rely on what earlier ones wrote. `told` hears of each group as soon as its outcome is known.
        """
        written: dict[Unmoved, int] = {}
        outcome = Committed(is_committed=True, revision=0)
        for group in _group(changes):
            read = [Unmoved(key, revision) for key, revision in group.conditions.items() if key != fence.key]
            conditions = [Unmoved(one.key, written.get(one, one.mod_revision)) for one in read]
            outcome = await self._transact([fence, *conditions], group.writes)
            if told is not None:
                told(group.changes, outcome)
            if not outcome.is_committed:
                return outcome
            self.revision = outcome.revision
            # Who read a key as this group did may rely on what it wrote there; who read it otherwise has lost.
            for one in read:
                write = group.pending.get(one.key)
                if write is not None:
                    written[one] = 0 if isinstance(write, Delete) else outcome.revision
        return outcome

    async def complete(self, changes: Sequence[Change], now_ms: int) -> list[Change]:
        """The changes with all of their writes; reads the events of the sandboxes that are removed."""
        removals = [one.removal for one in changes if one.removal is not None]
        if not removals:
            return list(changes)
        leases = await self._tombstones.current(), await self._histories.current()
        if leases[1] != self._kept_under:
            self._kept_under = leases[1]
            self._kept.clear()
        gate = asyncio.Semaphore(READS_AT_ONCE)
        histories = await asyncio.gather(*(self._history(gate, one) for one in removals))
        told = {one.sandbox_id: found for one, found in zip(removals, histories, strict=True)}
        done: list[Change] = []
        for place, one in enumerate(changes):
            if one.removal is None:
                done.append(one)
                continue
            departure = Departure(now_ms, place, *leases, is_past=not self._keeps(one.removal))
            left = left_behind(one.removal, departure, told[one.removal.sandbox_id])
            done.append(replace(one, writes=(*one.writes, *left)))
        return done

    def _keeps(self, removal: Removal) -> bool:
        """Whether its events are kept; a removal that loses its race and is tried again counts once."""
        kept = self._kept.setdefault(removal.owner.tenant, set())
        if len(kept) < HISTORIES_MAX:
            kept.add(removal.sandbox_id)
        return removal.sandbox_id in kept

    async def _history(self, gate: asyncio.Semaphore, removal: Removal) -> Sequence[KeyValue]:
        async with gate:
            return (await self._store.list_prefix(events_of(removal.owner.tenant, removal.sandbox_id))).entries

    async def _transact(self, conditions: list[Unmoved], writes: list[Write]) -> Committed:
        try:
            return await self._store.transact(conditions, writes)
        except ConflictError:
            # A lease in our writes has ended before its time: the next look takes new ones.
            self._tombstones.forget()
            self._histories.forget()
            self._cycles.forget()
            raise


class _SharedLease:
    """One lease for all that is put within `period_s`, never renewed: what is under it lives `ttl_s` less `period_s` at least."""

    def __init__(self, store: Store, clock: Callable[[], float], period_s: float, ttl_s: float) -> None:
        self._store = store
        self._clock = clock
        self._period_s = period_s
        self._ttl_s = ttl_s
        self._lease_id = 0
        self._until_s = -math.inf

    async def current(self) -> int:
        """The lease of this period."""
        if self._clock() >= self._until_s:
            self._lease_id = await self._store.grant_lease(self._ttl_s)
            self._until_s = self._clock() + self._period_s
        return self._lease_id

    def forget(self) -> None:
        """The lease is gone: the next use takes another."""
        self._until_s = -math.inf


def lifecycle_changes(snapshot: Snapshot, due: Iterable[LifecycleChange]) -> Iterator[Change]:
    """Orders, removals and withdrawals as writes."""
    for one in due:
        match one:
            case Order(assignment):
                keys = (_record_of(assignment), assignment_key(assignment.host_id, assignment.sandbox_id))
                yield Change(unmoved(snapshot, *keys), (Put(keys[1], encode(assignment)),))
            case Dismissal(assignment):
                keys = (_record_of(assignment), assignment_key(assignment.host_id, assignment.sandbox_id))
                yield Change(unmoved(snapshot, *keys), (Delete(keys[1]),))
            case Removal():
                gone = _gone_with(snapshot, one)
                yield Change(unmoved(snapshot, *gone), tuple(Delete(key) for key in gone), one)
            case _:
                key = refusal_key(one.sandbox_id)
                yield Change(unmoved(snapshot, key), (Delete(key),))


def unmoved(snapshot: Snapshot, *keys: str) -> tuple[Unmoved, ...]:
    """The conditions that nothing in `keys` moves after this moment; take them with the decision: the snapshot moves on."""
    return tuple(Unmoved(key, snapshot.mod_revisions.get(key, 0)) for key in keys)


def repair_changes(snapshot: Snapshot, repairs: Iterable[Reservation]) -> Iterator[Change]:
    """Reservations as they must be."""
    for reservation in repairs:
        key = reservation_key(reservation.host_id)
        yield Change(unmoved(snapshot, key), (Put(key, encode(reservation)),))


def plan_changes(
    snapshot: Snapshot, plan: Plan, cycle: str = "", submitted: Mapping[SandboxId, Submission] = NOTHING
) -> Iterator[Change]:
    """A plan's assignments with the reservations they lead to, and those refusals that say something new.

    What is `submitted` has no record yet: it is created together with its placement or its refusal.
    """
    sums, books = reserved(snapshot), Books(snapshot)
    bundle_of = {sandbox_id: bundle for bundle in plan.together for sandbox_id in bundle}
    bundled: list[Change] = []
    for place, one in enumerate(plan.assignments):
        assignment = replace(one, cycle=cycle)
        sums[assignment.host_id] = add(_sum_of(sums, assignment.host_id), growth(snapshot, assignment))
        balances = books.place(assignment)
        change = _place(snapshot, assignment, sums[assignment.host_id], balances, 2 * place + 1)
        bundle = bundle_of.get(assignment.sandbox_id)
        if bundle is None:
            yield _created(change, submitted.get(assignment.sandbox_id), 2 * place)
            continue
        # They follow each other in the plan.
        bundled.append(change)
        if len(bundled) == len(bundle):
            yield _merged(bundled)
            bundled = []
    for place, told in enumerate(plan.refusals, len(plan.assignments)):
        refusal, submission = replace(told, cycle=cycle), submitted.get(told.sandbox_id)
        known = snapshot.refusals.get(refusal.sandbox_id)
        if not is_news(refusal, known):
            continue
        record = submission.record if submission is not None else snapshot.records[refusal.sandbox_id]
        keys = (record_key(record.tenant, record.sandbox_id), refusal_key(refusal.sandbox_id))
        writes: list[Write] = [Put(keys[1], encode(refusal))]
        # Counts move with every sandbox that comes and goes; an event is told when other filters exclude.
        if events.codes_of(refusal) != events.codes_of(known):
            writes.append(events.refused(record, refusal, 2 * place + 1))
        change = Change(unmoved(snapshot, *keys), tuple(writes), about=record.sandbox_id)
        yield _created(change, submission, 2 * place)


def _merged(changes: Sequence[Change]) -> Change:
    """All of `changes` or none; of what several write the last stands. None of them may be submitted, so it is about none."""
    conditions = {condition.key: condition for one in changes for condition in one.unmoved}
    writes = {write.key: write for one in changes for write in one.writes}
    values = {key: value for one in changes for key, value in one.values}
    return Change(tuple(conditions.values()), tuple(writes.values()), values=tuple(values.items()))


def _created(change: Change, submission: Submission | None, place: int) -> Change:
    """`change` with the creation of the sandbox that it is about, where that is submitted."""
    if submission is None:
        return change
    creation = creation_of(submission.record, submission.actor, place)
    # The creation's conditions win: what is there already is never taken for its own. The id is put by both.
    conditions = {one.key: one for one in (*change.unmoved, *creation.unmoved)}
    writes = {one.key: one for one in (*creation.writes, *change.writes)}
    values = (*change.values, *creation.values)
    return replace(change, unmoved=tuple(conditions.values()), writes=tuple(writes.values()), values=values)


def creation_of(record: SandboxRecord, actor: str, place: int = 0) -> Change:
    """A new sandbox: nothing of it may be there yet, nor of another with its name, and its id was never destroyed."""
    keys = {
        record_key(record.tenant, record.sandbox_id): encode(record),
        id_key(record.sandbox_id): record.tenant.encode(),
        name_key(record.tenant, record.spec.name): record.sandbox_id.encode(),
    }
    absent = tuple(Unmoved(key, 0) for key in (*keys, tombstone_key(record.sandbox_id)))
    puts = tuple(Put(key, value) for key, value in keys.items())
    values = ((puts[0].key, record),)
    return Change(absent, (*puts, events.created(record, actor, place)), about=record.sandbox_id, values=values)


def is_news(refusal: Refusal, known: Refusal | None) -> bool:
    """Whether a refusal says something that the known one does not; a later time alone is nothing new."""
    return known is None or _said(refusal) != _said(known)


def _said(refusal: Refusal) -> tuple[object, ...]:
    return refusal.hosts_considered, refusal.reasons, refusal.host_id


def _place(
    snapshot: Snapshot, assignment: Assignment, reservation: Reservation, balances: Sequence[Balance], place: int
) -> Change:
    claim = id_key(assignment.sandbox_id)
    fence = reservation_key(assignment.host_id)
    order = assignment_key(assignment.host_id, assignment.sandbox_id)
    writes: list[Write] = [
        Put(order, encode(assignment)),
        Put(claim, assignment.tenant.encode()),
        Put(fence, encode(reservation)),
        *(Put(balance_key(one.tenant, one.account), encode(one)) for one in balances),
        events.assigned(assignment, place),
    ]
    if assignment.sandbox_id in snapshot.refusals:
        writes.append(Delete(refusal_key(assignment.sandbox_id)))
    host_keys = (fence, order, cordon_key(assignment.host_id), alive_key(assignment.host_id))
    paid = tuple((balance_key(one.tenant, one.account), one) for one in balances)
    conditions = unmoved(snapshot, _record_of(assignment), claim, *host_keys, *(key for key, _ in paid))
    values = ((order, assignment), (fence, reservation), *paid)
    return Change(conditions, tuple(writes), about=assignment.sandbox_id, values=values)


def _gone_with(snapshot: Snapshot, removal: Removal) -> list[str]:
    sandbox_id, owner = removal.sandbox_id, removal.owner
    keys = [record_key(owner.tenant, sandbox_id), id_key(sandbox_id), refusal_key(sandbox_id)]
    if removal.assignment is not None:
        keys.append(assignment_key(removal.assignment.host_id, sandbox_id))
    # The name may belong to a younger sandbox when this one's record was gone before.
    if snapshot.names.get((owner.tenant, owner.spec.name)) == sandbox_id:
        keys.append(name_key(owner.tenant, owner.spec.name))
    return keys


def left_behind(removal: Removal, departure: Departure, told: Sequence[KeyValue]) -> list[Write]:
    """What is put when a sandbox goes: its tombstone, its end, and again the events `told` of it until now."""
    owner = removal.owner
    tombstone = Put(tombstone_key(removal.sandbox_id), owner.tenant.encode(), departure.tombstone_lease)
    # Whoever follows hears of it. Kept for a week, what a loop removes day and night would fill the store.
    lease_id = departure.tombstone_lease if departure.is_past else departure.event_lease
    last = events.removed(owner, departure.now_ms, lease_id, departure.place)
    told = [entry for entry in told if entry.key != last.key]
    if departure.is_past:
        return [tombstone, *(Delete(entry.key) for entry in told), last]
    return [tombstone, *events.kept(told, departure.event_lease), last]


def _record_of(assignment: Assignment) -> str:
    return record_key(assignment.tenant, assignment.sandbox_id)


def _sum_of(sums: dict[HostId, Reservation], host_id: HostId) -> Reservation:
    return sums.get(host_id, Reservation(host_id))


@dataclass(slots=True)
class _Group:
    """Changes that go into one transaction; a key written twice keeps the later write."""

    conditions: dict[str, int]
    pending: dict[str, Write]
    changes: list[Change]
    size_bytes: int = 0

    @property
    def writes(self) -> list[Write]:
        return list(self.pending.values())

    def fits(self, change: Change) -> bool:
        """Whether `change` fits in as well, with one condition kept free for the fence."""
        if any(self.conditions.get(one.key, one.mod_revision) != one.mod_revision for one in change.unmoved):
            return False
        conditions = len(self.conditions) + sum(one.key not in self.conditions for one in change.unmoved)
        writes = len(self.pending) + sum(write.key not in self.pending for write in change.writes)
        size_bytes = self.size_bytes + self._growth_bytes(change)
        return max(conditions + 1, writes) <= TRANSACTION_OPS_MAX and size_bytes <= GROUP_BYTES_MAX

    def take(self, change: Change) -> None:
        """Adds `change`."""
        self.changes.append(change)
        self.size_bytes += self._growth_bytes(change)
        for one in change.unmoved:
            self.conditions.setdefault(one.key, one.mod_revision)
        self.pending.update({write.key: write for write in change.writes})

    def _growth_bytes(self, change: Change) -> int:
        return sum(_size_bytes(write) - _size_bytes(self.pending.get(write.key)) for write in change.writes)


def _size_bytes(write: Write | None) -> int:
    return len(write.value) if isinstance(write, Put) else 0


def _group(changes: Iterable[Change]) -> Iterator[_Group]:
    group = _Group({}, {}, [])
    for change in changes:
        if group.pending and not group.fits(change):
            yield group
            group = _Group({}, {}, [])
        group.take(change)
    if group.pending:
        yield group
