"""What to do so that the host looks like its orders: diff(desired, observed) -> actions, in order. PURE.

The order is the safety: rules stand before the tap, the tap before the domain, and everything is taken down the other way round.
"""

from dataclasses import dataclass
from enum import StrEnum

from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal, NetworkMode, Reason, StageName
from hostd.reconcile.progress import (
    DISK_LOST,
    STARTS_MAX,
    Progress,
    awaits_poweroff,
    has_stage,
    is_over,
    is_run_due,
    keeps_disk,
)
from hostd.reconcile.state import DomainState, Observed


class Step(StrEnum):
    """One idempotent effect on the host."""

    ENSURE_DISKS = "ensure_disks"
    ENSURE_PORT = "ensure_port"
    ENSURE_DOMAIN = "ensure_domain"
    RESUME_DOMAIN = "resume_domain"
    ATTACH_LINK = "attach_link"
    FAIL = "fail"
    DETACH_LINK = "detach_link"
    REMOVE_DOMAIN = "remove_domain"
    REMOVE_PORT = "remove_port"
    REMOVE_SCRATCH = "remove_scratch"
    REMOVE_FOLDER = "remove_folder"
    KEEP_SCRATCH = "keep_scratch"
    BEGIN_RUN = "begin_run"


# Steps that let a VM run: none of them while the fence is shut.
BEGINNINGS = frozenset({Step.ENSURE_DOMAIN, Step.RESUME_DOMAIN})


@dataclass(frozen=True, slots=True)
class Action:
    """A step for one sandbox; `reason` only with FAIL."""

    step: Step
    sandbox_id: SandboxId
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Desired:
    """One sandbox as its order wants it; a sandbox that nothing ordered has no Desired and is removed.

    While the host's fence does not let VMs begin (`may_begin`), none is started and none runs on; what ends still ends.
    """

    order: Assignment
    progress: Progress
    now_ms: int = 0
    may_begin: bool = True


_LIVE = (DomainState.RUNNING, DomainState.PAUSED)

VM_DIED = Reason("vm_died", "the VM ended while its agents ran", "see the console log on the host; submit it again")
VM_UNSTARTABLE = Reason(
    "vm_unstartable",
    f"the VM ended {STARTS_MAX} times before its guest reported",
    "see the console log on the host",
)


def diff(desired: Desired | None, observed: Observed, sandbox_id: SandboxId) -> tuple[Action, ...]:
    """The actions that lead from `observed` to `desired` for one sandbox; none when it is as it should be."""
    if desired is None:
        steps = _take_down(observed, sandbox_id)
        steps += [Step.REMOVE_FOLDER] if sandbox_id in observed.folders else []
    elif is_over(desired.progress, desired.order.goal):
        steps = _end(desired, observed, sandbox_id)
    else:
        return _bring_up(desired, observed, sandbox_id)
    return tuple(Action(step, sandbox_id) for step in steps)


def is_released(observed: Observed, sandbox_id: SandboxId, *, has_kept_disk: bool = False) -> bool:
    """Whether nothing of the sandbox's VM is left, apart from a disk that is kept: its vCPUs and memory are free again."""
    return not _take_down(observed, sandbox_id, keep_scratch=has_kept_disk)


def _end(desired: Desired, observed: Observed, sandbox_id: SandboxId) -> list[Step]:
    order, progress = desired.order, desired.progress
    state = observed.domains.get(sandbox_id, DomainState.ABSENT)
    if state in _LIVE and awaits_poweroff(progress, order.goal, desired.now_ms):
        steps = [Step.RESUME_DOMAIN] if state is DomainState.PAUSED and desired.may_begin else []
        return steps + ([] if sandbox_id in observed.links else [Step.ATTACH_LINK])
    is_kept = keeps_disk(progress, order.goal)
    steps = _take_down(observed, sandbox_id, keep_scratch=is_kept)
    if is_kept and sandbox_id in observed.scratch_disks and not has_stage(progress, StageName.DISK_KEPT):
        steps.append(Step.KEEP_SCRATCH)
    if order.goal is Goal.REMOVE and sandbox_id in observed.folders:
        steps.append(Step.REMOVE_FOLDER)
    if is_run_due(progress, order):
        steps.append(Step.BEGIN_RUN)
    return steps


def _take_down(observed: Observed, sandbox_id: SandboxId, *, keep_scratch: bool = False) -> list[Step]:
    steps = []
    if sandbox_id in observed.links:
        steps.append(Step.DETACH_LINK)
    if observed.domains.get(sandbox_id, DomainState.ABSENT) is not DomainState.ABSENT:
        steps.append(Step.REMOVE_DOMAIN)
    if sandbox_id in observed.network.taps | observed.network.chains:
        steps.append(Step.REMOVE_PORT)
    if sandbox_id in observed.scratch_disks and not keep_scratch:
        steps.append(Step.REMOVE_SCRATCH)
    return steps


def _bring_up(desired: Desired, observed: Observed, sandbox_id: SandboxId) -> tuple[Action, ...]:
    state = observed.domains.get(sandbox_id, DomainState.ABSENT)
    if state in _LIVE:
        steps = [] if _has_port(desired, observed) else [Step.ENSURE_PORT]
        steps += [Step.RESUME_DOMAIN] if state is DomainState.PAUSED and desired.may_begin else []
        steps += [] if sandbox_id in observed.links else [Step.ATTACH_LINK]
        return tuple(Action(step, sandbox_id) for step in steps)
    if desired.progress.is_configured:
        return (Action(Step.FAIL, sandbox_id, VM_DIED),)
    if desired.progress.starts >= STARTS_MAX:
        return (Action(Step.FAIL, sandbox_id, VM_UNSTARTABLE),)
    if not desired.may_begin:
        return ()
    is_continued = desired.progress.is_continued
    if is_continued and sandbox_id not in observed.scratch_disks:
        return (Action(Step.FAIL, sandbox_id, DISK_LOST),)
    # The remains of a start that failed go first: a scratch disk is used by one run only, or goes on from run to run.
    steps = _take_down(observed, sandbox_id, keep_scratch=is_continued)
    steps += [Step.ENSURE_DISKS]
    steps += [Step.ENSURE_PORT] if _wants_port(desired) else []
    steps += [Step.ENSURE_DOMAIN, Step.ATTACH_LINK]
    return tuple(Action(step, sandbox_id) for step in steps)


def _wants_port(desired: Desired) -> bool:
    return desired.order.spec.network.mode is not NetworkMode.NONE


def _has_port(desired: Desired, observed: Observed) -> bool:
    sandbox_id = desired.order.sandbox_id
    is_there = sandbox_id in observed.network.taps and sandbox_id in observed.network.chains
    return is_there or not _wants_port(desired)
