"""Every agent of this guest: started once, found again after a restart of guestd, stopped when the owner wants it."""

from __future__ import annotations

import contextlib
import os

from guestd.workload.aside import fork_aside, take_lock
from guestd.workload.cgroup import Cgroup
from guestd.workload.files import FAILED, AgentFiles, Record
from guestd.workload.supervisor import supervise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestd.configuration import Agent
    from guestd.state import State


class Crew:
    """The agents, by name. What is known of them is in their files; only their control FIFOs are kept open."""

    def __init__(self, agents: Sequence[Agent], state: State, cgroups: str) -> None:
        self._agents = {agent.name: agent for agent in agents}
        self._state = state
        self._cgroups = cgroups
        self._controls: dict[str, int] = {}
        self.files = {name: AgentFiles(state.agent_folder(name)) for name in self._agents}

    def ensure_started(self) -> None:
        """Every agent has a supervisor, or its end on record. Safe to repeat: none is ever started a second time."""
        for files in self.files.values():
            files.prepare()
        for name, files in self.files.items():
            if name not in self._controls:
                # Kept open: what is written to a FIFO that nobody has open is lost.
                self._controls[name] = os.open(files.control, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._ensure_agent(self._agents[name], files)

    def stop(self, grace_period_s: float | None) -> None:
        """Each agent is told to end, and made to after the grace period, or its own when None."""
        line = b"\n" if grace_period_s is None else f"{grace_period_s}\n".encode()
        for control in self._controls.values():
            # Full of stops that nobody has read: one more says nothing new.
            with contextlib.suppress(BlockingIOError):
                os.write(control, line)

    def _ensure_agent(self, agent: Agent, files: AgentFiles) -> None:
        lock = take_lock(files.lock)
        if lock is None:
            return
        cgroup = Cgroup(f"{self._cgroups}/agent-{agent.name}")
        if not files.was_started():
            fork_aside(lambda: supervise(agent, files, cgroup, self._state.nudge_path), lock)
            return
        record = files.load_record()
        if not record.has_ended:
            cgroup.kill()
            message = "its supervisor was killed, and with it the agent"
            files.put_record(Record(FAILED, message=message, cut=record.cut, restarts=record.restarts))
        os.close(lock)
