"""Which sandboxes leave their host, and which end with it. PURE: since when hosts are gone, and the time, are given.

    its host is lost, and fences itself: restarts, or had not begun  -> evicted: a further placement, the old order goes
                                         had begun and does not restart  -> ended: failed with `host_lost`
    its host ended it (fence, boot) and is back: restarts            -> evicted
    the scheduler has stopped it (drain, preemption), it is released -> evicted
    its host drains:                     may move                    -> stopped by the scheduler, MOVES at a time
                                         may not, and it is forced   -> ended: stopped with `host_drained`

A host is lost once this leader has seen its proof of life absent for FENCE_WAIT_S without a gap. A gap shows: every registration
writes the host's record anew, so an absence is one of a certain revision of it (docs/decisions/0050).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from fleet.model.assignment import Assignment
from fleet.model.host import HostCordon, HostLosses
from fleet.model.ids import HostId, SandboxId
from fleet.model.sandbox import ENDED_PHASES, Goal, Phase, Reason, Restart, SandboxRecord, SandboxStatus, StageName
from scheduler.placement.snapshot import HOST_LOST, Snapshot

# A host has killed its VMs 10 s after its lease ended, 25 s after a lease that it gave back itself; the rest is for slow clocks.
FENCE_WAIT_S = 30.0
# hostd is restarted in a few seconds: a shorter absence is no loss.
LOSS_S = 10.0
# A host that comes and goes gets nothing new for twice as long each time.
BACKOFF_MS, BACKOFF_MS_MAX = 30_000, 3_600_000
# So long after its last loss a host that has stayed is a good one again.
FORGET_MS = 3_600_000
LOSSES_KEPT = 8
# A sandbox that loses its host a third time may be what kills hosts: from then on it waits as long as they do.
MOVES_FREE = 2

# The codes of statuses, of hostd's making, which say that the host ended the VM: for want of a lease, or with its own end.
HOST_FENCED, HOST_RESTARTED = "host_fenced", "host_restarted"
HOST_DRAINED, PREEMPTED = "host_drained", "preempted"


@dataclass(frozen=True, slots=True)
class Absence:
    """A host whose proof of life is gone: at which revision its record stands, and since when (monotonic seconds) this is seen."""

    registration: int
    since_s: float


@dataclass(frozen=True, slots=True)
class Eviction:
    """A sandbox that shall have a further placement: its record, and its order until now, as they shall be put.

    `absence` is of the host that is lost; None where the host itself has said that the sandbox is over there.
    """

    record: SandboxRecord
    assignment: Assignment
    reason: Reason
    absence: Absence | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """A sandbox that the scheduler ends, as its record shall be put; `absence` as with an eviction."""

    record: SandboxRecord
    assignment: Assignment
    absence: Absence | None = None


@dataclass(frozen=True, slots=True)
class Halt:
    """A sandbox that stops where it is, to be placed elsewhere once it has; its order as it shall be put."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Loss:
    """What shall be remembered of a host's losses: None for nothing any more."""

    host_id: HostId
    losses: HostLosses | None


Move = Eviction | Ending | Halt | Loss


def find_absent(
    snapshot: Snapshot, known: Mapping[HostId, Absence], registration_of: Callable[[HostId], int], now_s: float
) -> dict[HostId, Absence]:
    """The registered hosts that are not alive; one that was known with the same registration keeps its time."""
    found = {}
    for host_id in snapshot.hosts.keys() - snapshot.alive:
        absence, registration = known.get(host_id), registration_of(host_id)
        if absence is None or absence.registration != registration:
            absence = Absence(registration, now_s)
        found[host_id] = absence
    return found


def due_moves(
    snapshot: Snapshot,
    absent: Mapping[HostId, Absence],
    *,
    now_s: float,
    now_ms: int,
    among: Iterable[SandboxId] | None = None,
) -> tuple[Move, ...]:
    """All that is due, or of what hosts have said what is about the sandboxes `among`; hosts first, then in the order of ids."""
    lost = {host_id: one for host_id, one in absent.items() if now_s - one.since_s >= FENCE_WAIT_S}
    moves: list[Move] = [*_losses(snapshot, absent, now_s, now_ms)]
    for host_id in sorted(lost):
        moves += _leave(snapshot, host_id, lost[host_id], now_ms)
    for sandbox_id in sorted(snapshot.records if among is None else among):
        moves += _for_sandbox(snapshot, sandbox_id, now_ms)
    for host_id, cordon in sorted(snapshot.cordons.items()):
        if cordon.is_draining and host_id in snapshot.alive:
            moves += _drain(snapshot, cordon)
    return tuple(moves)


def may_move(record: SandboxRecord, assignment: Assignment, status: SandboxStatus | None) -> bool:
    """Whether it may begin anew on another host: its agents restart, or none of them has ever run.

    hostd lets no guest begin before it has published that its domain started.
    """
    if any(agent.restart is not Restart.NO for agent in record.spec.agents):
        return True
    if max(1, assignment.run) > max(1, assignment.first_run):
        return False
    return status is None or not any(stage.name == StageName.DOMAIN_STARTED for stage in status.stages)


def halt(snapshot: Snapshot, sandbox_id: SandboxId, reason: Reason, *, is_forced: bool = True) -> Halt | Ending | None:
    """How a sandbox that runs leaves its host: moved if it may be, else ended if that is forced; None where it does not run."""
    record, assignment = snapshot.records.get(sandbox_id), snapshot.assignments.get(sandbox_id)
    if record is None or assignment is None or not _runs(snapshot, record, assignment):
        return None
    if may_move(record, assignment, _status(snapshot, assignment)):
        generation = assignment.generation + 1
        return Halt(replace(assignment, goal=Goal.STOP, generation=generation, reason=reason))
    return _end(record, assignment, reason) if is_forced else None


def awaits_move(record: SandboxRecord, assignment: Assignment, status: SandboxStatus) -> bool:
    """Whether what its host calls an end is none: it goes on elsewhere."""
    if record.goal is not Goal.RUN or status.phase not in ENDED_PHASES:
        return False
    if _is_halted(assignment):
        return status.phase is Phase.STOPPED
    return _is_fenced(status) and may_move(record, assignment, status)


def is_leaving(snapshot: Snapshot, record: SandboxRecord) -> bool:
    """Whether it is on its way to another host: stopped for that, or waiting for room."""
    assignment = snapshot.assignment_of(record)
    if record.goal is not Goal.RUN:
        return False
    return record.placement > 1 if assignment is None else _is_halted(assignment)


def backoff_ms(losses: int) -> int:
    """For how long nothing is placed after so many losses."""
    return min(BACKOFF_MS_MAX, BACKOFF_MS << min(losses - 1, LOSSES_KEPT)) if losses > 0 else 0


def _leave(snapshot: Snapshot, host_id: HostId, absence: Absence, now_ms: int) -> Iterator[Move]:
    """What becomes of the sandboxes of a lost host; all of them wait for one that does not fence itself."""
    if not snapshot.hosts[host_id].is_fenced or host_id in snapshot.opaque_hosts:
        return
    reason = Reason(HOST_LOST, f"its host {host_id} was lost", "mb host ls shows whether it is back")
    for sandbox_id in sorted(snapshot.sums.sandboxes_on.get(host_id, ())):
        record, assignment = snapshot.records.get(sandbox_id), snapshot.assignments.get(sandbox_id)
        if record is None or assignment is None or assignment.host_id != host_id:
            continue
        status = _status(snapshot, assignment)
        is_fenced = status is not None and _is_fenced(status)
        if not _is_current(snapshot, record, assignment) or (_has_ended(status) and not is_fenced):
            continue
        if may_move(record, assignment, status):
            yield replace(_evict(record, assignment, reason, now_ms), absence=absence)
        elif not is_fenced:
            yield replace(_end(record, assignment, reason), absence=absence)


def _for_sandbox(snapshot: Snapshot, sandbox_id: SandboxId, now_ms: int) -> Iterator[Move]:
    """What its host has said of it: ended for want of a lease, or stopped as the scheduler wished."""
    record, assignment = snapshot.records.get(sandbox_id), snapshot.assignments.get(sandbox_id)
    if record is None or assignment is None or not _is_current(snapshot, record, assignment):
        return
    status = _status(snapshot, assignment)
    if status is None or not status.released or not awaits_move(record, assignment, status):
        return
    if not _is_halted(assignment):
        assert status.reason is not None
        message = f"on host {assignment.host_id}: {status.reason.message}"
        reason = Reason(status.reason.code, message, "mb host ls shows whether it is well")
        yield _evict(record, assignment, reason, now_ms)
    elif status.generation == assignment.generation:
        assert assignment.reason is not None
        yield _evict(record, assignment, assignment.reason, 0)


def _drain(snapshot: Snapshot, cordon: HostCordon) -> Iterator[Move]:
    host_id = cordon.host_id
    reason = Reason(
        HOST_DRAINED, f"its host {host_id} is drained", "it is placed on another host as soon as one has room"
    )
    room = max(1, cordon.moves_max)
    candidates = []
    for sandbox_id in sorted(snapshot.sums.sandboxes_on.get(host_id, set()) - snapshot.opaque_sandboxes):
        record, assignment = snapshot.records.get(sandbox_id), snapshot.assignments.get(sandbox_id)
        if record is None or assignment is None:
            continue
        if is_leaving(snapshot, record):
            room -= 1
        elif assignment.host_id == host_id and _runs(snapshot, record, assignment):
            candidates.append(record)
    for record in sorted(candidates, key=lambda one: (one.created_at_ms, one.sandbox_id)):
        move = halt(snapshot, record.sandbox_id, reason, is_forced=cordon.is_forced)
        if isinstance(move, Halt):
            room -= 1
        if move is not None and (room >= 0 or isinstance(move, Ending)):
            yield move


def _losses(snapshot: Snapshot, absent: Mapping[HostId, Absence], now_s: float, now_ms: int) -> Iterator[Loss]:
    for host_id, absence in sorted(absent.items()):
        known = snapshot.losses.get(host_id, HostLosses(host_id, (), -1))
        # No time of return is one loss, by whichever leader it was noted.
        if known.until_ms != 0 and now_s - absence.since_s >= LOSS_S:
            yield Loss(host_id, HostLosses(host_id, (*known.at_ms, now_ms)[-LOSSES_KEPT:], 0))
    for host_id, losses in sorted(snapshot.losses.items()):
        if host_id not in snapshot.alive:
            continue
        waits_ms = backoff_ms(len(losses.at_ms))
        if losses.until_ms == 0:
            yield Loss(host_id, replace(losses, until_ms=now_ms + waits_ms))
        elif now_ms >= losses.until_ms + max(0, FORGET_MS - waits_ms):
            yield Loss(host_id, None)


def _evict(record: SandboxRecord, assignment: Assignment, reason: Reason, now_ms: int) -> Eviction:
    """Each further placement is a generation of its own; one that lost its host once more waits before it costs another."""
    placement = max(1, record.placement) + 1
    waits_ms = backoff_ms(placement - 1 - MOVES_FREE) if now_ms else 0
    moved = replace(
        record,
        placement=placement,
        generation=record.generation + 1,
        reason=reason,
        not_before_ms=now_ms + waits_ms if waits_ms else record.not_before_ms,
    )
    gone = replace(assignment, goal=Goal.REMOVE, generation=assignment.generation + 1, reason=reason)
    return Eviction(moved, gone, reason)


def _end(record: SandboxRecord, assignment: Assignment, reason: Reason) -> Ending:
    next_step = f"submit it again: mb destroy {record.spec.name}, then mb up"
    ended = replace(
        record, goal=Goal.STOP, generation=record.generation + 1, reason=replace(reason, next_step=next_step)
    )
    return Ending(ended, assignment)


def _is_current(snapshot: Snapshot, record: SandboxRecord, assignment: Assignment) -> bool:
    """Whether the order is the one that carries out a wish to run."""
    return (
        record.goal is Goal.RUN
        and record.sandbox_id not in snapshot.opaque_sandboxes
        and snapshot.assignment_of(record) is assignment
        and not snapshot.is_resuming(record)
    )


def _runs(snapshot: Snapshot, record: SandboxRecord, assignment: Assignment) -> bool:
    is_ordered = _is_current(snapshot, record, assignment) and assignment.goal is Goal.RUN
    return is_ordered and not _has_ended(_status(snapshot, assignment))


def _is_fenced(status: SandboxStatus) -> bool:
    code = status.reason.code if status.reason is not None else ""
    return status.phase is Phase.FAILED and code in (HOST_FENCED, HOST_RESTARTED)


def _is_halted(assignment: Assignment) -> bool:
    return assignment.goal is Goal.STOP and assignment.reason is not None


def _has_ended(status: SandboxStatus | None) -> bool:
    return status is not None and status.phase in ENDED_PHASES


def _status(snapshot: Snapshot, assignment: Assignment) -> SandboxStatus | None:
    """What its host says of the run that is ordered."""
    status = snapshot.status_of(assignment)
    return status if status is not None and status.run >= assignment.run else None
