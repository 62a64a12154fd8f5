"""Agents as processes. The only part of guestd that starts processes.

    guestd -- fork --> supervisor (root, one for each agent) -- fork, exec --> the agent (uid 1001, in a cgroup of its own)

A supervisor owns its agent's output and end: it writes both to files by itself, so nothing is lost when guestd is killed. It holds
the lock of its agent's files from before the fork to its own end: whoever finds the lock free and no end knows that it died.
"""

from guestd.workload.aside import fork_aside, reap_children, take_lock
from guestd.workload.crew import Crew
from guestd.workload.files import Record

__all__ = ["Crew", "Record", "fork_aside", "reap_children", "take_lock"]
