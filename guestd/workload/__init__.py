"""Agents and programs as processes. The only part of guestd that starts processes.

    guestd -- fork --> supervisor (root, one for each agent) -- fork, exec --> the agent (uid 1001, in a cgroup of its own)

A supervisor owns its agent's output and end: it writes both to files by itself, so nothing is lost when guestd is killed. It holds
the lock of its agent's files from before the fork to its own end: whoever finds the lock free and no end knows that it died.

    guestd -- fork --> a spare child (root, confined) -- told what to become --> a program that the owner runs by hand

A program's streams end in guestd itself: it is the owner's while the owner listens, and no longer.
"""

from guestd.workload.aside import fork_aside, reap_children, take_lock
from guestd.workload.cgroup import Cgroup, end_all
from guestd.workload.confine import AGENT, NOT_EXECUTABLE, ROOT, SECRETS_FOLDER, build_environment
from guestd.workload.crew import Crew
from guestd.workload.files import Record
from guestd.workload.program import Program
from guestd.workload.spare import Spare

__all__ = [
    "AGENT",
    "NOT_EXECUTABLE",
    "ROOT",
    "SECRETS_FOLDER",
    "Cgroup",
    "Crew",
    "Program",
    "Record",
    "Spare",
    "build_environment",
    "end_all",
    "fork_aside",
    "reap_children",
    "take_lock",
]
