"""What a host remembers of a sandbox only ever moves forward."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.model.assignment import Assignment, GpuShare
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import (
    Agent,
    AgentPhase,
    AgentStatus,
    Artifact,
    Goal,
    Phase,
    Reason,
    SandboxSpec,
    SandboxStatus,
    Stage,
    StageName,
)
from hostd.reconcile.progress import (
    Progress,
    begin,
    change_agent,
    fail,
    find_agent,
    have_agents_ended,
    is_over,
    keeps_disk,
    reach_stage,
    render_status,
    stop,
)

DIGEST = Digest("sha256:" + "0" * 64)
AGENTS = (Agent("one", "custom", ("true",)), Agent("two", "custom", ("true",)))
ORDER = Assignment(
    SandboxId("a" * 12),
    Tenant("acme"),
    HostId("host"),
    SandboxSpec("box", agents=AGENTS),
    DIGEST,
    64,
    Goal.RUN,
    7,
    1,
    1,
)
FRESH = begin(ORDER, "10.77.0.2", "generation")
BAD, WORSE = Reason("bad", "it is bad"), Reason("worse", "it is worse")
ARTIFACT = Artifact(DIGEST, 1, 0)


def agents(*phases: AgentPhase) -> tuple[AgentStatus, ...]:
    reasons = {AgentPhase.FAILED: BAD, AgentPhase.TIMED_OUT: WORSE}
    return tuple(
        AgentStatus(agent.name, phase, started_at_ms=phase is not AgentPhase.WAITING, reason=reasons.get(phase))
        for agent, phase in zip(AGENTS, phases, strict=True)
    )


def ended_at(*times_ms: int) -> tuple[AgentStatus, ...]:
    return tuple(
        replace(agent, ended_at_ms=time_ms)
        for agent, time_ms in zip(agents(AgentPhase.COMPLETED, AgentPhase.COMPLETED), times_ms, strict=True)
    )


def status(progress: Progress, goal: Goal = Goal.RUN) -> SandboxStatus:
    order = replace(ORDER, goal=goal)
    return render_status(order, progress, accelerator="tcg", is_released=False, now_ms=9)


def test_a_fresh_progress_waits() -> None:
    """Every agent of the spec has a status, none has begun."""
    assert [(agent.name, agent.phase) for agent in FRESH.agents] == [
        ("one", AgentPhase.WAITING),
        ("two", AgentPhase.WAITING),
    ]
    assert not have_agents_ended(FRESH)


BEGUN = SandboxStatus(ORDER.sandbox_id, ORDER.host_id, 7, Phase.RUNNING, stages=(Stage(StageName.CONFIGURED, 1),))
ELSEWHERE = replace(ORDER, placement=2, run=3, first_run=3)


@pytest.mark.parametrize(
    ("order", "told", "failure"),
    [
        (ORDER, None, ""),
        (ORDER, BEGUN, "state_lost"),
        (ORDER, replace(BEGUN, stages=()), ""),
        (replace(ORDER, run=2), None, "disk_lost"),
        # A further placement has no earlier disk, and what was told of an earlier one is over.
        (ELSEWHERE, None, ""),
        (ELSEWHERE, BEGUN, ""),
        (ELSEWHERE, replace(BEGUN, placement=2), "state_lost"),
        (replace(ELSEWHERE, run=4), None, "disk_lost"),
        (replace(ORDER, gpus=(GpuShare("0000:41:00.0", 1000),)), None, "gpus_unsupported"),
    ],
)
def test_how_a_sandbox_begins_here(order: Assignment, told: SandboxStatus | None, failure: str) -> None:
    """A first run or placement begins; what ran before and left nothing has failed, and so has what this host cannot give."""
    begun = begin(order, "", "", told)
    assert (begun.failure.code if begun.failure else "", begun.run) == (failure, order.run)
    assert status(begun).placement == 1
    assert render_status(order, begun, accelerator="", is_released=False, now_ms=1).placement == order.placement


def test_a_stage_keeps_its_first_time() -> None:
    """Reached again, a stage changes nothing; stages keep their order."""
    progress = reach_stage(reach_stage(reach_stage(FRESH, "a", 1), "b", 2), "a", 3)
    assert [(stage.name, stage.at_ms) for stage in progress.stages] == [("a", 1), ("b", 2)]


def test_the_first_failure_stays() -> None:
    """A later reason does not hide the first, and agents that had ended keep their end."""
    progress = replace(FRESH, agents=agents(AgentPhase.COMPLETED, AgentPhase.RUNNING))
    failed = fail(fail(progress, BAD), WORSE)
    assert failed.failure == BAD
    assert [(agent.phase, agent.reason) for agent in failed.agents] == [
        (AgentPhase.COMPLETED, None),
        (AgentPhase.FAILED, BAD),
    ]


def test_a_stop_that_is_forced_keeps_the_disk_of_an_agent_that_rested() -> None:
    """Waiting to be started again it had not ended by itself: the stop is what ends the run, however it goes."""
    ends = tuple(replace(agent, ended_at_ms=5) for agent in agents(AgentPhase.RESTARTING, AgentPhase.COMPLETED))
    stopping = stop(replace(FRESH, is_configured=True, agents=ends), 9)
    forced = fail(stopping, BAD)
    assert (keeps_disk(forced, Goal.STOP), status(forced, Goal.STOP).phase) == (True, Phase.STOPPED)


def test_a_stored_result_cannot_fail() -> None:
    """Once the artifact is stored, the VM may die as it likes."""
    done = replace(FRESH, artifact=ARTIFACT)
    assert fail(done, BAD) == done


@pytest.mark.parametrize("phase", [AgentPhase.COMPLETED, AgentPhase.FAILED, AgentPhase.TIMED_OUT])
def test_an_ended_agent_does_not_change(phase: AgentPhase) -> None:
    """Whatever its guest says later."""
    progress = replace(FRESH, agents=agents(phase, AgentPhase.WAITING))
    assert change_agent(progress, AgentStatus("one", AgentPhase.RUNNING)) == progress


def test_an_unknown_agent_changes_nothing() -> None:
    """Names come from the spec alone."""
    assert change_agent(FRESH, AgentStatus("three", AgentPhase.RUNNING)) == FRESH
    assert find_agent(FRESH, "three") is None


OVER = [
    (FRESH, Goal.RUN, False),
    (FRESH, Goal.STOP, True),
    (FRESH, Goal.REMOVE, True),
    (replace(FRESH, is_configured=True), Goal.RUN, False),
    (replace(FRESH, is_configured=True), Goal.STOP, False),
    (replace(FRESH, is_configured=True), Goal.REMOVE, True),
    *((replace(FRESH, failure=BAD), goal, True) for goal in Goal),
    *((replace(FRESH, artifact=ARTIFACT), goal, True) for goal in Goal),
]


@pytest.mark.parametrize(("progress", "goal", "expected"), OVER)
def test_when_a_sandbox_needs_its_vm_no_more(progress: Progress, goal: Goal, expected: bool) -> None:
    """With a result or without hope, when it is to go, or to stop before it began; a running stop still needs it."""
    assert is_over(progress, goal) is expected


PHASES: list[tuple[dict[str, Any], Goal, Phase, Reason | None]] = [
    ({}, Goal.RUN, Phase.STARTING, None),
    ({"is_configured": True}, Goal.RUN, Phase.STARTING, None),
    ({"agents": agents(AgentPhase.RUNNING, AgentPhase.WAITING)}, Goal.RUN, Phase.RUNNING, None),
    ({"agents": agents(AgentPhase.COMPLETED, AgentPhase.FAILED)}, Goal.RUN, Phase.RUNNING, None),
    ({"agents": agents(*[AgentPhase.COMPLETED] * 2), "artifact": ARTIFACT}, Goal.RUN, Phase.COMPLETED, None),
    ({"agents": agents(*[AgentPhase.COMPLETED] * 2), "artifact": ARTIFACT}, Goal.STOP, Phase.COMPLETED, None),
    ({"agents": agents(AgentPhase.COMPLETED, AgentPhase.FAILED), "artifact": ARTIFACT}, Goal.RUN, Phase.FAILED, BAD),
    (
        {"agents": agents(AgentPhase.COMPLETED, AgentPhase.TIMED_OUT), "artifact": ARTIFACT},
        Goal.RUN,
        Phase.FAILED,
        WORSE,
    ),
    # A stop that comes after the end changes nothing; one before it is what ended the run, however the agents took it.
    ({"agents": agents(AgentPhase.COMPLETED, AgentPhase.FAILED), "artifact": ARTIFACT}, Goal.STOP, Phase.FAILED, BAD),
    (
        {"agents": ended_at(4, 9), "artifact": ARTIFACT, "stopping_since_ms": 5},
        Goal.STOP,
        Phase.STOPPED,
        None,
    ),
    (
        {"agents": ended_at(3, 4), "artifact": ARTIFACT, "stopping_since_ms": 5},
        Goal.STOP,
        Phase.COMPLETED,
        None,
    ),
    ({"failure": BAD}, Goal.STOP, Phase.FAILED, BAD),
    ({"failure": BAD}, Goal.RUN, Phase.FAILED, BAD),
    ({"failure": BAD, "stopping_since_ms": 1}, Goal.STOP, Phase.STOPPED, BAD),
    ({}, Goal.STOP, Phase.STOPPED, None),
    ({"is_configured": True}, Goal.STOP, Phase.STARTING, None),
    ({"failure": BAD}, Goal.REMOVE, Phase.REMOVING, BAD),
    ({}, Goal.REMOVE, Phase.REMOVING, None),
]


@pytest.mark.parametrize(("changes", "goal", "phase", "reason"), PHASES)
def test_the_phase_that_is_published(changes: dict[str, Any], goal: Goal, phase: Phase, reason: Reason | None) -> None:
    """Each state has one phase, and a phase that is bad news has its reason."""
    shown = status(replace(FRESH, **changes), goal)
    assert (shown.phase, shown.reason) == (phase, reason)


def test_a_status_answers_its_order() -> None:
    """Generation, host and address are those of the order and the progress it was made from."""
    shown = status(FRESH)
    assert (shown.generation, shown.host_id, shown.address, shown.at_ms, shown.released) == (
        7,
        "host",
        "10.77.0.2",
        9,
        False,
    )
