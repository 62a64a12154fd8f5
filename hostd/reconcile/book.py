"""How the sessions read and change what this host knows of its sandboxes: one place, so that nobody forgets to tell of a change."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import structlog

from fleet.errors import HostFaultError
from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId
from fleet.model.sandbox import AgentStatus, Reason
from hostd.orders import Orders
from hostd.reconcile.progress import Progress, fail, find_agent, is_over
from hostd.reconcile.words import clean

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Book:
    """Orders and progress; `changed` is called when a sandbox has come further, `counted` when only more of its output is here."""

    orders: Orders
    changed: Callable[[], None]
    counted: Callable[[], None]
    now_ms: Callable[[], int]

    def open_order(self, sandbox_id: SandboxId) -> Assignment | None:
        """The sandbox's order, None when nothing more is to be heard of its guest."""
        order, progress = self.orders.orders.get(sandbox_id), self.orders.progress.get(sandbox_id)
        return None if order is None or progress is None or is_over(progress, order.goal) else order

    def progress(self, sandbox_id: SandboxId) -> Progress:
        """How far a sandbox with an order is."""
        return self.orders.progress[sandbox_id]

    def known_agent(self, sandbox_id: SandboxId, name: Any) -> AgentStatus:
        """The agent that a guest names; raises ValueError when the spec has none of that name."""
        known = find_agent(self.progress(sandbox_id), name)
        if known is None:
            raise ValueError(f"the spec has no agent {clean(name)[:40]!r}")
        return known

    def save(self, progress: Progress) -> None:
        """Keeps a sandbox's progress durably, if it is another one, and tells; raises HostFaultError `disk_failed`."""
        if self.orders.progress.get(progress.sandbox_id) != progress:
            self.orders.put_progress(progress)
            self.changed()

    def record(self, order: Assignment, kind: str, detail: str, actor: str) -> None:
        """Writes down what `actor`, or the tenant when it is empty, did to a sandbox that this host still holds.

        Raises HostFaultError `disk_failed`.
        """
        if order.sandbox_id in self.orders.orders:
            self.orders.record(order.sandbox_id, kind, actor=actor or f"tenant/{order.tenant}", detail=detail)

    def fail(self, sandbox_id: SandboxId, reason: Reason) -> None:
        """The sandbox has failed; raises nothing."""
        failed = fail(self.progress(sandbox_id), reason)
        try:
            self.save(failed)
        except HostFaultError as error:
            # The disk may be what failed. In memory the sandbox is over all the same, and its VM is taken down.
            log.error("progress.unwritten", sandbox_id=sandbox_id, error=error.message)
            self.orders.hold_progress(failed)
            self.changed()

    def hold(self, agent: AgentStatus, progress: Progress) -> None:
        """Takes over an agent's counters, also those of one that has ended while its last output was still on its way."""
        agents = tuple(agent if other.name == agent.name else other for other in progress.agents)
        is_new_stage = progress.stages != self.progress(progress.sandbox_id).stages
        self.orders.hold_progress(replace(progress, agents=agents))
        if is_new_stage:
            self.orders.put_progress(replace(progress, agents=agents))
            self.changed()
        self.counted()
