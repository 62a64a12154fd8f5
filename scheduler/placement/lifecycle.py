"""How a sandbox's wish reaches its host, and how the sandbox ends. PURE.

record newer than assignment       -> the assignment takes over its goal and generation
record of a run not placed yet     -> left to the plan
record REMOVE, host says REMOVED   -> the assignment goes, and the host forgets the sandbox
record REMOVE, nobody remembers it -> removed, its id stays taken for a while
assignment without a record        -> its goal becomes REMOVE, then it is removed as well
refusal of one that is not pending -> withdrawn
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal, Phase, SandboxRecord
from scheduler.placement.snapshot import Snapshot


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


def due_changes(snapshot: Snapshot) -> tuple[LifecycleChange, ...]:
    """All that is due by the snapshot, in the order of sandbox ids."""
    return (*_for_records(snapshot), *_for_orphans(snapshot), *_for_refusals(snapshot))


def _for_records(snapshot: Snapshot) -> Iterator[LifecycleChange]:
    # A host that is away cannot forget; it does when it comes back, and the owner need not wait for that.
    remembered = {sandbox_id for host_id, sandbox_id in snapshot.statuses if host_id in snapshot.alive}
    for sandbox_id, record in sorted(snapshot.records.items()):
        if sandbox_id in snapshot.opaque_sandboxes:
            continue
        assignment = snapshot.assignment_of(record)
        if assignment is None:
            if record.goal is Goal.REMOVE and sandbox_id not in remembered:
                yield Removal(sandbox_id, record, None)
        elif assignment.generation < record.generation and not snapshot.is_resuming(record):
            yield Order(replace(assignment, goal=record.goal, generation=record.generation))
        elif record.goal is Goal.REMOVE and _is_gone(snapshot, assignment):
            yield Dismissal(assignment)


def _for_orphans(snapshot: Snapshot) -> Iterator[LifecycleChange]:
    for sandbox_id, assignment in sorted(snapshot.assignments.items()):
        record = snapshot.records.get(sandbox_id)
        is_owned = record is not None and record.tenant == assignment.tenant
        if is_owned or sandbox_id in snapshot.opaque_sandboxes:
            continue
        if assignment.goal is not Goal.REMOVE:
            yield Order(replace(assignment, goal=Goal.REMOVE, generation=assignment.generation + 1))
        elif _is_gone(snapshot, assignment):
            yield Removal(sandbox_id, None, assignment)


def _for_refusals(snapshot: Snapshot) -> Iterator[LifecycleChange]:
    pending = {record.sandbox_id for record in snapshot.pending()}
    for sandbox_id in sorted(set(snapshot.refusals) - pending - snapshot.opaque_sandboxes):
        yield Withdrawal(sandbox_id)


def _is_gone(snapshot: Snapshot, assignment: Assignment) -> bool:
    status = snapshot.status_of(assignment)
    if status is None or status.generation != assignment.generation:
        return False
    return status.phase is Phase.REMOVED and status.released
