"""What a host remembers about one sandbox, and how it may change. PURE: every change is a function to a new Progress.

    prepared -> domain started -> configured -> agents running -> agents ended -> artifact stored -> released
    at any point: failure, which also leads to released

`is_configured` is the point of no return: from there an agent may have run, so no second domain is ever started.
"""

from dataclasses import dataclass, replace

from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import (
    ENDED_AGENT_PHASES,
    AgentPhase,
    AgentStatus,
    Artifact,
    Goal,
    Phase,
    Reason,
    SandboxStatus,
    Stage,
)

# A guest that dies before it is configured may have met a passing fault; a third time it has not.
STARTS_MAX = 3

STAGE_RELEASED = "released"


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


def begin(order: Assignment, address: str, generation_id: str) -> Progress:
    """The progress of a sandbox that this host has just accepted."""
    agents = tuple(AgentStatus(agent.name) for agent in order.spec.agents)
    return Progress(order.sandbox_id, address, generation_id, agents=agents)


def reach_stage(progress: Progress, name: str, now_ms: int) -> Progress:
    """Notes a stage once; a stage that is reached again keeps its first time."""
    if any(stage.name == name for stage in progress.stages):
        return progress
    return replace(progress, stages=(*progress.stages, Stage(name, now_ms)))


def fail(progress: Progress, reason: Reason) -> Progress:
    """The sandbox has failed as a whole; the first reason stays. An agent still running is failed with it."""
    if progress.failure is not None or progress.artifact is not None:
        return progress
    agents = tuple(
        agent if agent.phase in ENDED_AGENT_PHASES else replace(agent, phase=AgentPhase.FAILED, reason=reason)
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
    """Whether the sandbox needs its VM no more: its result is stored, or there will be none."""
    if progress.failure is not None or progress.artifact is not None:
        return True
    return goal is Goal.REMOVE or (goal is Goal.STOP and not progress.is_configured)


def render_status(
    order: Assignment, progress: Progress, *, accelerator: str, is_released: bool, now_ms: int
) -> SandboxStatus:
    """The status to publish; `is_released` says that nothing of the VM is left on the host."""
    phase = _phase(order, progress)
    return SandboxStatus(
        sandbox_id=order.sandbox_id,
        host_id=order.host_id,
        generation=order.generation,
        phase=phase,
        reason=_reason(phase, progress),
        agents=progress.agents,
        stages=progress.stages,
        artifact=progress.artifact,
        accelerator=accelerator,
        address=progress.address,
        released=is_released,
        at_ms=now_ms,
    )


def _phase(order: Assignment, progress: Progress) -> Phase:
    if order.goal is Goal.REMOVE:
        return Phase.REMOVING
    if progress.failure is not None:
        return Phase.STOPPED if progress.stopping_since_ms else Phase.FAILED
    if progress.artifact is not None:
        return _final_phase(order, progress)
    if order.goal is Goal.STOP and not progress.is_configured:
        return Phase.STOPPED
    return Phase.RUNNING if any(agent.started_at_ms for agent in progress.agents) else Phase.STARTING


def _final_phase(order: Assignment, progress: Progress) -> Phase:
    if all(agent.phase is AgentPhase.COMPLETED for agent in progress.agents):
        return Phase.COMPLETED
    return Phase.STOPPED if order.goal is Goal.STOP else Phase.FAILED


def _reason(phase: Phase, progress: Progress) -> Reason | None:
    if progress.failure is not None:
        return progress.failure
    if phase is not Phase.FAILED:
        return None
    return next((agent.reason for agent in progress.agents if agent.phase is not AgentPhase.COMPLETED), None)
