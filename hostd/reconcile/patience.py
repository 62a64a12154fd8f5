"""How long hostd waits for what a guest owes it, and what it says once it has waited too long. PURE: its times are given.

The guest keeps its own limits first; these hold against one that does not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fleet.model.assignment import Assignment
from fleet.model.sandbox import ENDED_AGENT_PHASES, Agent, AgentStatus, Reason
from hostd.reconcile.progress import Progress

# Twice a pass and half: passes look at the clock every 5 s. What is longer hostd was stopped, and heard nobody.
GAP_S_MAX = 15.0
# guestd says something every 5 s. With eight processes burning its one CPU under TCG, on a crowded two-core host, its heartbeats
# still came 5.0 s apart at most (tests/integration/guestd/test_busy.py).
UNRESPONSIVE_S = 30.0
# How long it was is told in these steps: a status that changed every second would be written every second.
UNRESPONSIVE_STEPS_S = (UNRESPONSIVE_S, 60.0, 120.0, 180.0, 240.0)
# A guest that has not been heard of for so long is gone. Under TCG the first word takes 10 s alone, minutes on a crowded host.
SILENCE_S_MAX = 300.0
# Whoever ordered the sandbox has its values at hand: mb sends them by itself. Until then a VM stands idle.
SECRETS_S_MAX = 15 * 60.0
# The guest's clock may go slower than the host's. Beyond that, timeout and grace period a killed process takes its time, and a
# hostd that comes back has to hear first of what ended while it was away.
OVERRUN_SHARE, OVERRUN_S_MAX = 0.01, 120.0
# Without a byte for so long, with more announced, no more will come: a guest under TCG sends 1 MiB in a second.
STALL_S_MAX = 120.0
# 200,000 paths and 1 GiB, read under TCG on a crowded host, before the first chunk is there.
PACK_S_MAX = 30 * 60.0
# All output and the artifact, at their largest, take half an hour at 1 MiB/s. A guest that trickles ends here.
FINISH_S_MAX = 2 * 3600.0

GUEST_SILENT = Reason(
    "guest_silent", f"the guest was not heard of for {SILENCE_S_MAX:.0f} s", "see the console log on the host"
)
OUTPUT_STALLED = Reason(
    "output_stalled",
    f"the guest announced more output than it sent, and sent nothing for {STALL_S_MAX:.0f} s",
    "what came is there: mb logs NAME; submit it again",
)
ARTIFACT_STALLED = Reason(
    "artifact_stalled",
    "the guest did not finish its artifact in time",
    "its output is there: mb logs NAME; submit it again",
)
SECRETS_AWAITED = Reason("secrets_awaited", "the sandbox waits for the values of its secrets", "mb secret send NAME")
SECRETS_MISSING = Reason(
    "secrets_missing",
    f"the values of its secrets did not come within {SECRETS_S_MAX / 60:.0f} min",
    "submit it again with mb up, which sends them",
)


class ListeningClock:
    """Seconds in which hostd could hear its guests: while it was stopped itself, nobody was silent and nobody late."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._looked_at_s = clock()
        self._lost_s = 0.0

    def __call__(self) -> float:
        """The time now. To be asked at least every GAP_S_MAX."""
        now_s = self._clock()
        if now_s - self._looked_at_s > GAP_S_MAX:
            self._lost_s += now_s - self._looked_at_s
        self._looked_at_s = now_s
        return now_s - self._lost_s


@dataclass(frozen=True, slots=True)
class Waiting:
    """For how many seconds hostd has waited for a guest; None for what it does not wait for."""

    secrets_s: float | None = None
    # For the end of all output and the artifact, since the last agent ended; and since anything of them came.
    finish_s: float | None = None
    stalled_s: float = 0.0
    is_collecting: bool = False
    has_begun_artifact: bool = False
    # For the end of each agent that its guest should have ended by now.
    overdue_s: Mapping[str, float] = field(default_factory=dict)


def find_lateness(order: Assignment, waiting: Waiting) -> Reason | None:
    """Why the sandbox has failed by now, if hostd has waited too long for anything."""
    if waiting.secrets_s is not None and waiting.secrets_s > SECRETS_S_MAX:
        return SECRETS_MISSING
    for agent in order.spec.agents:
        if waiting.overdue_s.get(agent.name, 0.0) > OVERRUN_S_MAX:
            message = f"the guest did not end agent {agent.name} at its timeout of {agent.timeout_s:g} s"
            return Reason("agent_overran", message, "see the console log on the host; submit it again")
    if waiting.finish_s is None:
        return None
    stall_s_max = PACK_S_MAX if waiting.is_collecting and not waiting.has_begun_artifact else STALL_S_MAX
    if waiting.stalled_s <= stall_s_max and waiting.finish_s <= FINISH_S_MAX:
        return None
    return ARTIFACT_STALLED if waiting.is_collecting else OUTPUT_STALLED


def find_overdue(order: Assignment, progress: Progress, now_ms: int) -> frozenset[str]:
    """The agents that the guest should have ended by now, by the timeouts of their order."""
    statuses = {status.name: status for status in progress.agents}
    agents = [agent for agent in order.spec.agents if agent.name in statuses]
    return frozenset(agent.name for agent in agents if _is_overdue(agent, statuses[agent.name], now_ms))


def describe_silence(silent_s: float) -> Reason | None:
    """What to say of a guest that runs and was not heard of for so long; None while that is no news."""
    passed = [step for step in UNRESPONSIVE_STEPS_S if silent_s >= step]
    if not passed:
        return None
    message = f"the guest was not heard of for {passed[-1]:.0f} s"
    next_step = f"wait, or mb stop NAME; the host ends it after {SILENCE_S_MAX:.0f} s"
    return Reason("guest_unresponsive", message, next_step)


def _is_overdue(agent: Agent, status: AgentStatus, now_ms: int) -> bool:
    if not agent.timeout_s or not status.started_at_ms or status.phase in ENDED_AGENT_PHASES:
        return False
    allowed_s = agent.timeout_s * (1 + OVERRUN_SHARE) + agent.grace_period_s
    return now_ms - status.started_at_ms > allowed_s * 1000
