"""One sandbox as a client sees it: record, assignment, refusal, status and its host's life, joined. PURE."""

from dataclasses import replace

from fleet.model.assignment import Assignment, Sandbox
from fleet.model.ids import NO_DIGEST, NO_HOST, SandboxId, Tenant
from fleet.model.sandbox import ENDED_PHASES, Goal, Phase, Reason, SandboxRecord, SandboxStatus
from scheduler.api.wishes import current_status, is_lost
from scheduler.placement.evictions import awaits_move
from scheduler.placement.snapshot import Snapshot


def view(record: SandboxRecord, snapshot: Snapshot) -> Sandbox:
    """The sandbox of `record`, which may be newer than the snapshot."""
    assignment = snapshot.assignment_of(record)
    # What its host says of an earlier run is not shown as if it were said of this one.
    status = current_status(record, snapshot)
    is_pending = record.goal is Goal.RUN and (assignment is None or snapshot.is_resuming(record))
    phase = _phase(record, assignment, status, snapshot)
    if assignment is not None and status is not None and phase in (Phase.LOST, Phase.REMOVING):
        status = _explain(assignment, status, snapshot)
    if assignment is not None and is_lost(record):
        known = status or SandboxStatus(record.sandbox_id, assignment.host_id, record.generation, phase, run=record.run)
        status = replace(known, phase=phase, reason=record.reason)
    return Sandbox(
        sandbox_id=record.sandbox_id,
        tenant=record.tenant,
        spec=record.spec,
        goal=record.goal,
        generation=record.generation,
        created_at_ms=record.created_at_ms,
        phase=phase,
        host_id=assignment.host_id if assignment is not None else NO_HOST,
        image_digest=assignment.image_digest if assignment is not None else NO_DIGEST,
        refusal=snapshot.refusals.get(record.sandbox_id) if is_pending else None,
        status=status,
        assigned_at_ms=assignment.assigned_at_ms if assignment is not None else 0,
        run=record.run,
        placement=max(1, record.placement),
        reason=record.reason,
    )


def view_removed(last: Sandbox) -> Sandbox:
    """A sandbox of which nothing is left, as it was seen last."""
    return replace(last, goal=Goal.REMOVE, phase=Phase.REMOVED, refusal=None)


def brief(sandbox: Sandbox) -> Sandbox:
    """A sandbox for a listing: its agents without command, prompt and env, which may be long; asking for it shows them."""
    agents = tuple(replace(agent, command=(), prompt="", env=()) for agent in sandbox.spec.agents)
    return replace(sandbox, spec=replace(sandbox.spec, agents=agents))


def views_of(snapshot: Snapshot, tenant: Tenant | None) -> list[Sandbox]:
    """The sandboxes of a tenant, or of all, the oldest first."""
    found = [record for record in snapshot.records.values() if tenant in (None, record.tenant)]
    return [view(record, snapshot) for record in sorted(found, key=_age)]


def _age(record: SandboxRecord) -> tuple[int, SandboxId]:
    return record.created_at_ms, record.sandbox_id


def _explain(assignment: Assignment, status: SandboxStatus, snapshot: Snapshot) -> SandboxStatus:
    """The status with the reason that the scheduler knows and the host cannot tell: that it is away."""
    if assignment.host_id in snapshot.alive:
        return status
    message = f"host {assignment.host_id} is not heard of; what was ordered is done when it is back"
    return replace(status, reason=Reason("host_lost", message, "bring the host back, or ask its operator: mb host ls"))


def _phase(
    record: SandboxRecord, assignment: Assignment | None, status: SandboxStatus | None, snapshot: Snapshot
) -> Phase:
    if record.goal is Goal.REMOVE:
        return Phase.REMOVING
    if is_lost(record):
        return Phase.FAILED
    if assignment is None:
        # Stopped before it had a host: it will never have one.
        return Phase.STOPPED if record.goal is Goal.STOP else Phase.PENDING
    return Phase.PENDING if snapshot.is_resuming(record) else _placed_phase(record, assignment, status, snapshot)


def _placed_phase(
    record: SandboxRecord, assignment: Assignment, status: SandboxStatus | None, snapshot: Snapshot
) -> Phase:
    if status is not None and awaits_move(record, assignment, status):
        return Phase.LOST if status.phase is Phase.FAILED else Phase.PENDING
    if status is not None and status.phase in ENDED_PHASES:
        return status.phase
    if assignment.host_id not in snapshot.alive:
        return Phase.LOST
    return status.phase if status is not None else Phase.ASSIGNED
