"""What to do so that the host looks like its orders: diff(desired, observed) -> actions, in order. PURE.

The order is the safety: rules stand before the tap, the tap before the domain, and everything is taken down the other way round.
"""

from dataclasses import dataclass
from enum import StrEnum

from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal, NetworkMode, Reason
from hostd.reconcile.progress import STARTS_MAX, Progress, is_over
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


@dataclass(frozen=True, slots=True)
class Action:
    """A step for one sandbox; `reason` only with FAIL."""

    step: Step
    sandbox_id: SandboxId
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Desired:
    """One sandbox as its order wants it; a sandbox that nothing ordered has no Desired and is removed."""

    order: Assignment
    progress: Progress


VM_DIED = Reason("vm_died", "the VM ended while its agents ran", "see the console log on the host; submit it again")
VM_UNSTARTABLE = Reason(
    "vm_unstartable",
    f"the VM ended {STARTS_MAX} times before its guest reported",
    "see the console log on the host",
)


def diff(desired: Desired | None, observed: Observed, sandbox_id: SandboxId) -> tuple[Action, ...]:
    """The actions that lead from `observed` to `desired` for one sandbox; none when it is as it should be."""
    if desired is None:
        steps = _take_down(observed, sandbox_id, keep_folder=False)
    elif is_over(desired.progress, desired.order.goal):
        steps = _take_down(observed, sandbox_id, keep_folder=desired.order.goal is not Goal.REMOVE)
    else:
        return _bring_up(desired, observed, sandbox_id)
    return tuple(Action(step, sandbox_id) for step in steps)


def is_released(observed: Observed, sandbox_id: SandboxId) -> bool:
    """Whether nothing of the sandbox's VM is left: its vCPUs, memory and disk are free again."""
    return not _take_down(observed, sandbox_id, keep_folder=True)


def _take_down(observed: Observed, sandbox_id: SandboxId, *, keep_folder: bool) -> list[Step]:
    steps = []
    if sandbox_id in observed.links:
        steps.append(Step.DETACH_LINK)
    if observed.domains.get(sandbox_id, DomainState.ABSENT) is not DomainState.ABSENT:
        steps.append(Step.REMOVE_DOMAIN)
    if sandbox_id in observed.network.taps | observed.network.chains:
        steps.append(Step.REMOVE_PORT)
    if sandbox_id in observed.scratch_disks:
        steps.append(Step.REMOVE_SCRATCH)
    if sandbox_id in observed.folders and not keep_folder:
        steps.append(Step.REMOVE_FOLDER)
    return steps


def _bring_up(desired: Desired, observed: Observed, sandbox_id: SandboxId) -> tuple[Action, ...]:
    state = observed.domains.get(sandbox_id, DomainState.ABSENT)
    if state is DomainState.RUNNING or state is DomainState.PAUSED:
        steps = [] if _has_port(desired, observed) else [Step.ENSURE_PORT]
        steps += [Step.RESUME_DOMAIN] if state is DomainState.PAUSED else []
        steps += [] if sandbox_id in observed.links else [Step.ATTACH_LINK]
        return tuple(Action(step, sandbox_id) for step in steps)
    if desired.progress.is_configured:
        return (Action(Step.FAIL, sandbox_id, VM_DIED),)
    if desired.progress.starts >= STARTS_MAX:
        return (Action(Step.FAIL, sandbox_id, VM_UNSTARTABLE),)
    # The remains of a start that failed go first: a scratch disk is only used once.
    steps = _take_down(observed, sandbox_id, keep_folder=True)
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
