"""What a creation must meet before it is written, and why one that was not written was not."""

from fleet.errors import BedplateError, ConflictError, ExhaustedError, InvalidSpecError, UnavailableError
from fleet.model.admission import refusals
from fleet.model.ids import SandboxId, Tenant, is_sandbox_id
from fleet.model.sandbox import Goal, SandboxRecord, SandboxSpec
from scheduler.budget.accounts import LINEAGE_MAX
from scheduler.placement.snapshot import Snapshot

# The fields behind the first are named, not explained: a message for people, not a report.
FIELDS_NAMED_MAX = 8


def check_id(sandbox_id: str) -> SandboxId:
    """The id a client has chosen; raises InvalidSpecError `id_invalid` when it is none."""
    if not is_sandbox_id(sandbox_id):
        message = "it is not 12 characters of a-z and 2-7"
        raise InvalidSpecError("id_invalid", message, "make one at random", field="sandbox_id")
    return SandboxId(sandbox_id)


def check_spec(snapshot: Snapshot, tenant: Tenant, spec: SandboxSpec) -> None:
    """Raises InvalidSpecError for what no host can do, or whose sources no host holds."""
    found = refusals(spec)
    if found:
        first, others = found[0], [other.field for other in found[1:]]
        also = f" (also refused: {', '.join(others[:FIELDS_NAMED_MAX])}{', …' * (len(others) > FIELDS_NAMED_MAX)})"
        raise InvalidSpecError(first.code, first.message + also * bool(others), first.next_step, field=first.field)
    for index, source in enumerate(spec.sources):
        if (tenant, source.digest) not in snapshot.sources:
            message = f"no host holds {source.digest}"
            raise InvalidSpecError(
                "source_missing", message, "upload it first; mb up does", field=f"sources[{index}].digest"
            )


def check_room(snapshot: Snapshot, tenant: Tenant, queued: int, sandboxes_max: int) -> None:
    """Raises ExhaustedError when a tenant has as many sandboxes as it may, with the `queued` that are about to be."""
    if snapshot.sums.records_of.get(tenant, 0) + queued >= sandboxes_max:
        message = f"tenant {tenant} has {sandboxes_max} sandboxes, as many as it may (limits.sandboxes_per_tenant)"
        raise ExhaustedError("sandboxes_exhausted", message, "destroy some with mb destroy, then try again")


def check_lineage(snapshot: Snapshot, tenant: Tenant, spec: SandboxSpec) -> tuple[SandboxId, ...]:
    """A new sandbox's ancestors, the parent first; raises InvalidSpecError for a parent or an account that there is not."""
    if spec.budget and (tenant, spec.budget) not in snapshot.budgets:
        message = f"tenant {tenant} has no account {spec.budget}"
        raise InvalidSpecError("budget_unknown", message, "mb budget ls shows those there are", field="budget")
    if not spec.parent:
        return ()
    parent = snapshot.records.get(spec.parent)
    if parent is None or parent.tenant != tenant or parent.goal is Goal.REMOVE:
        message = f"tenant {tenant} has no sandbox {spec.parent}"
        raise InvalidSpecError("parent_unknown", message, "mb ls shows those there are", field="parent")
    if len(parent.ancestors) + 1 > LINEAGE_MAX:
        message = f"it would be the child of {LINEAGE_MAX} sandboxes below one another, as many as may be"
        raise InvalidSpecError("lineage_too_deep", message, "start it from a sandbox higher up", field="parent")
    return (parent.sandbox_id, *parent.ancestors)


def explain_conflict(
    record: SandboxRecord, *, is_destroyed: bool, is_claimed: bool, name_holder: SandboxId | None
) -> BedplateError:
    """Why `record` could not be created, by what is in the store; a plain "try again" when nothing stands in the way any more."""
    if is_destroyed:
        message = f"sandbox {record.sandbox_id} was destroyed"
        return ConflictError("id_destroyed", message, "choose another id to run it again")
    if is_claimed:
        return id_reused(record.sandbox_id)
    if name_holder is not None:
        name = record.spec.name
        message = f"the name {name} is taken by sandbox {name_holder}"
        return ConflictError("name_taken", message, f"mb destroy {name} first, or choose another with --name")
    return UnavailableError("create_outrun", "other changes were faster", "try again")


def id_reused(sandbox_id: SandboxId) -> ConflictError:
    """The id stands for something else."""
    message = f"the id {sandbox_id} is in use for another sandbox"
    return ConflictError("id_reused", message, "choose another id")
