"""How a sandbox's wish reaches its host, and how the sandbox ends. PURE.

record newer than assignment       -> the assignment takes over its goal and generation, unless the scheduler has halted it
order of an earlier placement      -> its goal becomes REMOVE; it goes when its host says REMOVED
record of a run not placed yet     -> left to the plan
record REMOVE, host says REMOVED   -> the assignment goes, and the host forgets the sandbox
record REMOVE, nobody remembers it -> removed, its id stays taken for a while
assignment without a record        -> its goal becomes REMOVE, then it is removed as well
refusal of one that is not pending -> withdrawn
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal, Phase, SandboxRecord
from scheduler.placement.snapshot import Snapshot, is_left_behind


@dataclass(frozen=True, slots=True)
class Order:
    """An assignment that shall be put as it is here."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Dismissal:
    """An assignment that its host has carried out to the end: it goes, and then the host's status goes too."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Removal:
    """A sandbox of which nothing is left on any host: its keys go."""

    sandbox_id: SandboxId
    record: SandboxRecord | None
    assignment: Assignment | None

    @property
    def owner(self) -> SandboxRecord | Assignment:
        """Whichever of the two there is; one is."""
        owner = self.record or self.assignment
        assert owner is not None
        return owner


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A refusal that no longer says anything."""

    sandbox_id: SandboxId


LifecycleChange = Order | Dismissal | Removal | Withdrawal


def due_changes(snapshot: Snapshot, among: Iterable[SandboxId] | None = None) -> tuple[LifecycleChange, ...]:
    """All that is due by the snapshot, or what of it is about the sandboxes `among`; in the order of sandbox ids."""
    if among is None:
        among = {*snapshot.records, *snapshot.assignments, *snapshot.refusals}
    ids = sorted(set(among) - snapshot.opaque_sandboxes)
    older: dict[SandboxId, list[Assignment]] = {}
    for (_, sandbox_id), remnant in sorted(snapshot.remnants.items()):
        older.setdefault(sandbox_id, []).append(remnant)
    return tuple(change for sandbox_id in ids for change in _due(snapshot, sandbox_id, older.get(sandbox_id, [])))


def _due(snapshot: Snapshot, sandbox_id: SandboxId, older: list[Assignment]) -> Iterator[LifecycleChange]:
    record, assignment = snapshot.records.get(sandbox_id), snapshot.assignments.get(sandbox_id)
    if record is not None:
        yield from _for_record(snapshot, record)
        if assignment is not None and record.tenant == assignment.tenant and assignment.placement < record.placement:
            older = [assignment, *older]
    for remnant in older:
        yield from _for_remnant(snapshot, remnant)
    if assignment is not None and (record is None or record.tenant != assignment.tenant):
        yield from _for_orphan(snapshot, assignment)
    if sandbox_id in snapshot.refusals and (record is None or not snapshot.is_pending(record)):
        yield Withdrawal(sandbox_id)


def _for_record(snapshot: Snapshot, record: SandboxRecord) -> Iterator[LifecycleChange]:
    assignment = snapshot.assignment_of(record)
    if assignment is None:
        # A host that is away cannot forget; it does when it comes back, and the owner need not wait for that.
        if record.goal is Goal.REMOVE and not _is_remembered(snapshot, record):
            yield Removal(record.sandbox_id, record, None)
    elif _is_overtaken(record, assignment) and not snapshot.is_resuming(record):
        generation = max(record.generation, assignment.generation + 1)
        reason = assignment.reason if is_left_behind(assignment) else record.reason
        yield Order(replace(assignment, goal=record.goal, generation=generation, reason=reason))
    elif record.goal is Goal.REMOVE and _is_gone(snapshot, assignment):
        yield Dismissal(assignment)


def _is_overtaken(record: SandboxRecord, assignment: Assignment) -> bool:
    """Whether the order is not what the record wishes; one that the scheduler has halted stands for a wish to run."""
    if record.goal is Goal.RUN and assignment.goal is Goal.STOP and assignment.reason is not None:
        return False
    return assignment.generation < record.generation or assignment.goal is not record.goal


def _for_remnant(snapshot: Snapshot, remnant: Assignment) -> Iterator[LifecycleChange]:
    if remnant.goal is not Goal.REMOVE:
        yield Order(replace(remnant, goal=Goal.REMOVE, generation=remnant.generation + 1))
    elif _is_gone(snapshot, remnant):
        yield Dismissal(remnant)


def _for_orphan(snapshot: Snapshot, assignment: Assignment) -> Iterator[LifecycleChange]:
    if assignment.goal is not Goal.REMOVE:
        yield Order(replace(assignment, goal=Goal.REMOVE, generation=assignment.generation + 1))
    elif _is_gone(snapshot, assignment):
        yield Removal(assignment.sandbox_id, None, assignment)


def _is_remembered(snapshot: Snapshot, record: SandboxRecord) -> bool:
    return any((host_id, record.sandbox_id) in snapshot.statuses for host_id in snapshot.alive)


def _is_gone(snapshot: Snapshot, assignment: Assignment) -> bool:
    status = snapshot.status_of(assignment)
    if status is None or status.generation != assignment.generation:
        return False
    return status.phase is Phase.REMOVED and status.released
