"""What becomes of a record when its owner stops, starts or destroys the sandbox; unchanged when it is so already. PURE.

The snapshot must be at least as new as the record: a placement before the record's last change is in it, and none comes after.
"""

from collections.abc import Callable
from dataclasses import replace

from fleet.errors import ConflictError
from fleet.model.sandbox import ENDED_PHASES, Goal, Phase, SandboxRecord, SandboxStatus
from scheduler.budget.accounts import chain_of, limits_of
from scheduler.budget.balance import BUDGET_EXHAUSTED, find_exhausted, say_exhausted, spent_of
from scheduler.placement.evictions import awaits_move
from scheduler.placement.snapshot import HOST_LOST, Snapshot

Wish = Callable[[SandboxRecord, Snapshot], SandboxRecord]


def stop(record: SandboxRecord, snapshot: Snapshot) -> SandboxRecord:
    """Its VM shall end. One that has ended, by itself or by a stop, is left as it is; REMOVE is final and not called back."""
    if record.goal is not Goal.RUN or has_ended(record, snapshot):
        return record
    return _wish(record, Goal.STOP)


def start(record: SandboxRecord, snapshot: Snapshot) -> SandboxRecord:
    """It shall run again on the disk it had; a start that comes twice starts once.

    Raises ConflictError `not_stopped` for what is not stopped, or not yet; `budget_exhausted` while an account has nothing left.
    """
    # A record that shall run and has changed since its creation, beyond its moves, was changed by a start.
    if record.goal is Goal.RUN and record.generation > max(1, record.placement) and not has_ended(record, snapshot):
        return record
    name, assignment = record.spec.name, snapshot.assignment_of(record)
    if record.goal is Goal.REMOVE:
        raise ConflictError("not_stopped", f"sandbox {name} is being removed", "mb up, once it is gone")
    if is_lost(record):
        message = f"sandbox {name} has failed: its host was lost, and with that its disk is gone"
        raise ConflictError("not_stopped", message, f"run it anew: mb destroy {name}, then mb up")
    if record.goal is Goal.STOP and assignment is None:
        # It was stopped before it had a host, so this is its first run still.
        return _wish(record, Goal.RUN)
    # What its host said of an earlier run says nothing about this one: a stop that it has not seen would be forgotten.
    status = current_status(record, snapshot)
    is_moving = assignment is not None and status is not None and awaits_move(record, assignment, status)
    if status is None or status.phase not in ENDED_PHASES or is_moving:
        if record.goal is Goal.STOP:
            raise _still_stopping(name)
        raise ConflictError("not_stopped", f"sandbox {name} is not stopped", "it runs already, or waits for a host")
    if status.phase is not Phase.STOPPED:
        message = f"sandbox {name} has {status.phase}, and with that its disk is gone"
        raise ConflictError("not_stopped", message, f"run it anew: mb destroy {name}, then mb up")
    if not status.released:
        raise _still_stopping(name)
    _check_budgets(record, snapshot)
    return replace(_wish(record, Goal.RUN), run=max(1, record.run) + 1)


def _check_budgets(record: SandboxRecord, snapshot: Snapshot) -> None:
    for account in chain_of(snapshot, record).accounts:
        limit = limits_of(snapshot, record.tenant, account).total
        found = find_exhausted(limit, spent_of(snapshot, record.tenant, account))
        if found is not None:
            message = say_exhausted(record.tenant, account, *found)
            next_step = "mb budget show says what is left; mb budget set raises a limit"
            raise ConflictError(BUDGET_EXHAUSTED, message, next_step)


def _wish(record: SandboxRecord, goal: Goal) -> SandboxRecord:
    """The owner's own word; why the scheduler moved or ended it before is over with it."""
    return replace(record, goal=goal, generation=record.generation + 1, reason=None)


def _still_stopping(name: str) -> ConflictError:
    next_step = f"mb stop {name} --wait, then start it again"
    return ConflictError("not_stopped", f"sandbox {name} is still being stopped", next_step)


def remove(record: SandboxRecord, snapshot: Snapshot) -> SandboxRecord:  # noqa: ARG001 (one shape for all wishes)
    """Every trace of it shall go."""
    if record.goal is Goal.REMOVE:
        return record
    return _wish(record, Goal.REMOVE)


def is_lost(record: SandboxRecord) -> bool:
    """Whether it has failed with its host: it had begun there, and does not restart."""
    return record.goal is Goal.STOP and record.reason is not None and record.reason.code == HOST_LOST


def has_ended(record: SandboxRecord, snapshot: Snapshot) -> bool:
    """Whether the run that `record` asks for is over by what its host says."""
    assignment, status = snapshot.assignment_of(record), current_status(record, snapshot)
    if assignment is None or status is None or awaits_move(record, assignment, status):
        return False
    return status.phase in ENDED_PHASES and status.run >= record.run


def current_status(record: SandboxRecord, snapshot: Snapshot) -> SandboxStatus | None:
    """What its host says of the newest run that it was given; None while it has only spoken of an earlier one."""
    assignment = snapshot.assignment_of(record)
    status = snapshot.status_of(assignment) if assignment is not None else None
    if assignment is None or status is None or status.run < assignment.run or snapshot.is_resuming(record):
        return None
    return status
