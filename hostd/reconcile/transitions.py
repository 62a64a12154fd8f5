"""Which events a change of order or progress is. PURE: the journal numbers them, whoever makes the change writes them."""

from dataclasses import replace

from fleet.model.assignment import Assignment
from fleet.model.event import Event
from fleet.model.ids import Tenant
from fleet.model.sandbox import AgentStatus
from hostd.reconcile.progress import Progress, find_agent, find_phase

SCHEDULER, GUEST = "scheduler", "guest"


def describe_order(
    before: Assignment | None, after: Assignment, progress: Progress | None, *, at_ms: int, origin: str
) -> list[Event]:
    """The events of an order that is taken; its goal alone may change the sandbox's phase."""
    about = _about(after, progress, at_ms, origin)
    taken = replace(about, kind="order.taken", actor=SCHEDULER, cause=f"goal_{after.goal}", after=str(after.goal))
    events = [replace(taken, before=str(before.goal) if before else "", generation=after.generation, run=after.run)]
    if progress is not None and before is None:
        # The first run's progress is there before its order.
        phase = str(find_phase(after.goal, progress))
        events.append(replace(about, kind="run.begun", actor=SCHEDULER, cause=f"goal_{after.goal}", after=phase))
    if progress is not None and before is not None:
        phases = (str(find_phase(before.goal, progress)), str(find_phase(after.goal, progress)))
        if phases[0] != phases[1]:
            changed = replace(about, kind="sandbox.phase_changed", actor=SCHEDULER, cause=f"goal_{after.goal}")
            events.append(replace(changed, before=phases[0], after=phases[1]))
    return events


def describe_progress(
    order: Assignment | None, before: Progress | None, after: Progress, *, at_ms: int, origin: str
) -> list[Event]:
    """The events of a progress that changes, agents first; none when only counters or stages did."""
    if before is after or order is None:
        return []
    about = _about(order, after, at_ms, origin)
    phase = str(find_phase(order.goal, after))
    if before is None or before.run != after.run:
        was = str(find_phase(order.goal, before)) if before else ""
        return [replace(about, kind="run.begun", cause=f"goal_{order.goal}", before=was, after=phase)]
    events = [
        event
        for agent in after.agents
        if (event := _describe_agent(about, find_agent(before, agent.name), agent, after))
    ]
    was = str(find_phase(order.goal, before))
    if was != phase:
        reason = after.failure or next((agent.reason for agent in after.agents if agent.reason), None)
        changed = replace(about, kind="sandbox.phase_changed", before=was, after=phase)
        actor = origin if after.failure or before.agents == after.agents else GUEST
        events.append(
            replace(
                changed,
                actor=actor,
                cause=reason.code if reason else f"goal_{order.goal}" if after.stopping_since_ms else "",
                detail=reason.message if reason else "",
            )
        )
    return events


def describe_removal(order: Assignment, progress: Progress | None, *, at_ms: int, origin: str) -> Event:
    """The event of a sandbox whose last trace on this host goes."""
    about = _about(order, progress, at_ms, origin)
    return replace(about, kind="sandbox.removed", cause=f"goal_{order.goal}", before="removing", after="removed")


def _describe_agent(about: Event, before: AgentStatus | None, after: AgentStatus, progress: Progress) -> Event | None:
    if before is None or (before.phase is after.phase and before.restarts == after.restarts):
        return None
    is_restart = after.restarts > before.restarts
    end = f"exit code {after.exit_code}" if after.exit_code is not None else ""
    end = f"signal {after.signal}" if after.signal else end
    return replace(
        about,
        kind="agent.restarted" if is_restart else "agent.phase_changed",
        agent=after.name,
        before=str(before.phase),
        after=str(after.phase),
        actor=about.actor if progress.failure else GUEST,
        cause=after.reason.code if after.reason else "",
        detail=after.reason.message if after.reason else end,
    )


def _about(order: Assignment, progress: Progress | None, at_ms: int, origin: str) -> Event:
    run = progress.run if progress else order.run
    generation = order.generation
    return Event(order.sandbox_id, Tenant(order.tenant), origin, 0, at_ms, origin, "", generation=generation, run=run)
