"""How far a drain has come, and why some sandboxes have not left. PURE."""

from collections.abc import Iterator

from fleet.model.assignment import Assignment
from fleet.model.host import Straggler
from fleet.model.ids import HostId
from fleet.model.sandbox import ENDED_PHASES, Goal, SandboxRecord
from scheduler.placement.evictions import is_leaving, may_move
from scheduler.placement.snapshot import Snapshot

# Whoever reads them looks at the first ones.
STRAGGLERS_MAX = 100


def describe_drain(snapshot: Snapshot, host_id: HostId) -> tuple[int, int, tuple[Straggler, ...]]:
    """How many sandboxes still run on the host, how many are on their way, and why some wait; what is over is not counted."""
    left = moving = 0
    stragglers: list[Straggler] = []
    for sandbox_id in sorted(snapshot.sums.sandboxes_on.get(host_id, ())):
        record, assignment = snapshot.records.get(sandbox_id), snapshot.assignments.get(sandbox_id)
        if record is None or assignment is None:
            continue
        if is_leaving(snapshot, record):
            moving += 1
            stragglers += _wait_for_room(snapshot, record)
        elif assignment.host_id == host_id and not _is_over(snapshot, record, assignment):
            left += 1
            stragglers += _wait_for_end(snapshot, record, assignment)
    return left, moving, tuple(stragglers[:STRAGGLERS_MAX])


def _is_over(snapshot: Snapshot, record: SandboxRecord, assignment: Assignment) -> bool:
    status = snapshot.status_of(assignment)
    is_over = status is not None and status.phase in ENDED_PHASES and status.released and status.run >= assignment.run
    return is_over or snapshot.is_resuming(record)


def _wait_for_room(snapshot: Snapshot, record: SandboxRecord) -> Iterator[Straggler]:
    refusal = snapshot.refusals.get(record.sandbox_id)
    if refusal is not None and snapshot.is_pending(record):
        said = "; ".join(f"{reason.hosts}: {reason.message}" for reason in refusal.reasons)
        yield _straggler(record, "no_room", f"no other host takes it: {said}")


def _wait_for_end(snapshot: Snapshot, record: SandboxRecord, assignment: Assignment) -> Iterator[Straggler]:
    if record.goal is not Goal.RUN:
        yield _straggler(record, "stopping", "it is being stopped, or removed")
    elif not may_move(record, assignment, snapshot.status_of(assignment)):
        yield _straggler(record, "may_not_move", "it has begun, and no agent of it restarts: it is waited for")


def _straggler(record: SandboxRecord, code: str, message: str) -> Straggler:
    return Straggler(record.sandbox_id, record.tenant, record.spec.name, code, message)
