"""What a host remembers about one sandbox, and how it may change. PURE: every change is a function to a new Progress.

    prepared -> domain started -> configured -> agents running -> agents ended -> artifact stored -> released
    at any point: failure, which also leads to released
    released after a stop, scratch disk kept -- an order of a later run --> prepared
    a later run fails before it is configured --> released, scratch disk kept, as after a stop

`is_configured` is the point of no return: from there an agent may have run, so no second domain is ever started in this run.
"""

from dataclasses import dataclass, replace

from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import (
    ENDED_AGENT_PHASES,
    ENDED_PHASES,
    AgentPhase,
    AgentStatus,
    Artifact,
    Goal,
    Phase,
    Reason,
    SandboxStatus,
    Stage,
    StageName,
)

# A guest that dies before it is configured may have met a passing fault; a third time it has not.
STARTS_MAX = 3
# A guest syncs and powers off in 2 s under TCG; its disk has a journal, so one that takes longer is cut off without harm.
POWEROFF_S_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Progress:
    """One sandbox on this host, as stored on its disk (proto/bedplate/host/v1/progress.proto)."""

    sandbox_id: SandboxId
    address: str = ""
    generation_id: str = ""
    starts: int = 0
    is_configured: bool = False
    agents: tuple[AgentStatus, ...] = ()
    stages: tuple[Stage, ...] = ()
    artifact: Artifact | None = None
    failure: Reason | None = None
    stopping_since_ms: int = 0
    boot_id: str = ""
    run: int = 1
    output_bases: tuple[int, ...] = ()
    is_continued: bool = False


DISK_LOST = Reason(
    "disk_lost",
    "the disk that the sandbox's last run left is not on its host any more",
    "submit it again: mb destroy NAME, mb up",
)

STATE_LOST = Reason(
    "state_lost",
    "its host has lost what it knew of the sandbox, and its agents may have run: they do not run twice",
    "submit it again: mb destroy NAME, mb up",
)


GPUS_UNSUPPORTED = Reason(
    "gpus_unsupported",
    "this host cannot give a GPU to a VM",
    "ask for none, or for a host of a later version",
)


def begin(order: Assignment, address: str, generation_id: str, told: SandboxStatus | None = None) -> Progress:
    """The progress of a sandbox that this host has just accepted; one that ran before and left nothing here has failed.

    `told` is what an earlier hostd of this host has published of it: of an earlier placement it says nothing, for that one has been
    removed wholly before the sandbox came back.
    """
    agents = tuple(AgentStatus(agent.name) for agent in order.spec.agents)
    bases = (0,) * len(agents)
    progress = Progress(
        order.sandbox_id, address, generation_id, agents=agents, run=max(1, order.run), output_bases=bases
    )
    if told is not None and max(1, told.placement) == max(1, order.placement) and _may_have_begun(told):
        return fail(progress, STATE_LOST)
    if order.gpus:
        # hostd registers none, so nobody should order one; a field that is not enforced here is never ignored.
        return fail(progress, GPUS_UNSUPPORTED)
    return fail(progress, DISK_LOST) if progress.run > max(1, order.first_run) else progress


def _may_have_begun(told: SandboxStatus) -> bool:
    # A guest is configured only after the store has its domain's start (Sessions.may_begin): from that word on it may have been.
    begun = (StageName.DOMAIN_STARTED, StageName.CONFIGURED)
    return told.phase in ENDED_PHASES or any(stage.name in begun for stage in told.stages)


def begin_run(progress: Progress, order: Assignment) -> Progress:
    """The next run of a sandbox whose last one is over: address, output and a kept disk stay, all else begins anew."""
    bases = tuple(base + agent.output_bytes for base, agent in zip(progress.output_bases, progress.agents, strict=True))
    return Progress(
        progress.sandbox_id,
        progress.address,
        agents=tuple(AgentStatus(agent.name) for agent in order.spec.agents),
        run=order.run,
        output_bases=bases,
        is_continued=progress.is_continued or has_stage(progress, StageName.DISK_KEPT),
    )


def is_run_due(progress: Progress, order: Assignment) -> bool:
    """Whether the order wants a later run than this, and this one is over."""
    return order.goal is not Goal.REMOVE and order.run > progress.run and is_over(progress, order.goal)


def current_run(progress: Progress, order: Assignment) -> Progress:
    """The run that the order is about, also while it has not begun."""
    return begin_run(progress, order) if is_run_due(progress, order) else progress


def has_stage(progress: Progress, name: StageName) -> bool:
    """Whether this run has reached a stage."""
    return any(stage.name == name for stage in progress.stages)


def reach_stage(progress: Progress, name: str, now_ms: int) -> Progress:
    """Notes a stage once; a stage that is reached again keeps its first time."""
    if any(stage.name == name for stage in progress.stages):
        return progress
    return replace(progress, stages=(*progress.stages, Stage(name, now_ms)))


def fail(progress: Progress, reason: Reason) -> Progress:
    """The sandbox has failed as a whole; the first reason stays. An agent still running is failed with it."""
    if progress.failure is not None or progress.artifact is not None:
        return progress
    # One that waited to be started again had not ended: its last end is no end of its own accord.
    agents = tuple(
        agent
        if agent.phase in ENDED_AGENT_PHASES
        else replace(agent, phase=AgentPhase.FAILED, reason=reason, ended_at_ms=0)
        for agent in progress.agents
    )
    return replace(progress, failure=reason, agents=agents)


def change_agent(progress: Progress, status: AgentStatus) -> Progress:
    """Takes over one agent's new status, unless that agent has ended already."""
    agents = tuple(
        status if agent.name == status.name and agent.phase not in ENDED_AGENT_PHASES else agent
        for agent in progress.agents
    )
    return replace(progress, agents=agents)


def find_agent(progress: Progress, name: str) -> AgentStatus | None:
    """The status of the agent of that name, or None."""
    return next((agent for agent in progress.agents if agent.name == name), None)


def have_agents_ended(progress: Progress) -> bool:
    """Whether no agent will run any more."""
    return all(agent.phase in ENDED_AGENT_PHASES for agent in progress.agents)


def is_over(progress: Progress, goal: Goal) -> bool:
    """Whether this run needs no agent any more: its result is stored, or there will be none."""
    if progress.failure is not None or progress.artifact is not None or goal is Goal.REMOVE:
        return True
    return not progress.is_configured and was_stopped(progress, goal)


def stop(progress: Progress, now_ms: int) -> Progress:
    """Notes when the owner wished this run to stop: once, and not when it is over."""
    if progress.stopping_since_ms or is_over(progress, Goal.RUN):
        return progress
    return replace(progress, stopping_since_ms=now_ms)


def was_stopped(progress: Progress, goal: Goal) -> bool:
    """Whether the owner's wish is what ends this run: it came before the agents had all ended by themselves.

    A further run that failed before it began leaves the sandbox as it was: stopped, with its disk.
    """
    if progress.is_continued and not progress.is_configured and progress.failure not in (None, DISK_LOST):
        return True
    if not progress.stopping_since_ms:
        return goal is Goal.STOP and progress.artifact is None and progress.failure is None
    return any(not 0 < agent.ended_at_ms < progress.stopping_since_ms for agent in progress.agents)


def keeps_disk(progress: Progress, goal: Goal) -> bool:
    """Whether the scratch disk stays once the run is over, for another one to go on with."""
    return goal is not Goal.REMOVE and was_stopped(progress, goal)


def awaits_poweroff(progress: Progress, goal: Goal, now_ms: int) -> bool:
    """Whether the guest has a moment yet to bring its disk in order and power off: its result is stored, its disk is kept."""
    if progress.artifact is None or progress.failure is not None or not keeps_disk(progress, goal):
        return False
    stored_ms = next((stage.at_ms for stage in progress.stages if stage.name == StageName.ARTIFACT_STORED), 0)
    return 0 <= now_ms - stored_ms < POWEROFF_S_MAX * 1000


def render_status(
    order: Assignment, progress: Progress, *, accelerator: str, is_released: bool, now_ms: int
) -> SandboxStatus:
    """The status to publish; `is_released` says that nothing of the VM is left on the host, apart from a disk it keeps.

    It always answers the order's own run: one that is due has not begun yet, and is published as starting.
    """
    progress = current_run(progress, order)
    phase = find_phase(order.goal, progress)
    return SandboxStatus(
        sandbox_id=order.sandbox_id,
        host_id=order.host_id,
        generation=order.generation,
        phase=phase,
        reason=_reason(phase, progress),
        agents=_with_whole_output(progress),
        stages=progress.stages,
        artifact=progress.artifact,
        accelerator=accelerator,
        address=progress.address,
        released=is_released,
        at_ms=now_ms,
        run=progress.run,
        placement=max(1, order.placement),
    )


def find_phase(goal: Goal, progress: Progress) -> Phase:
    """The sandbox's phase; that of a run which is over changes with no later goal but REMOVE."""
    if goal is Goal.REMOVE:
        return Phase.REMOVING
    if not is_over(progress, goal):
        return Phase.RUNNING if any(agent.started_at_ms for agent in progress.agents) else Phase.STARTING
    if was_stopped(progress, goal):
        return Phase.STOPPED
    is_success = progress.failure is None and all(agent.phase is AgentPhase.COMPLETED for agent in progress.agents)
    return Phase.COMPLETED if is_success else Phase.FAILED


def _with_whole_output(progress: Progress) -> tuple[AgentStatus, ...]:
    """The agents with what all runs have printed, as output is read."""
    bases = progress.output_bases or (0,) * len(progress.agents)
    return tuple(
        replace(agent, output_bytes=base + agent.output_bytes)
        for base, agent in zip(bases, progress.agents, strict=True)
    )


def _reason(phase: Phase, progress: Progress) -> Reason | None:
    if progress.failure is not None:
        return progress.failure
    if phase is not Phase.FAILED:
        return None
    return next((agent.reason for agent in progress.agents if agent.phase is not AgentPhase.COMPLETED), None)
