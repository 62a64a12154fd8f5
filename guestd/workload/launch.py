"""Turns a forked child into the agent, confined and with its output where its supervisor reads it."""

from __future__ import annotations

import fcntl
import json
import os

from guestd.workload.confine import become_agent, become_program, build_environment, enter_confinement
from guestd.workload.files import FAILED, Record
from guestd.workload.terminal import SESSION_TERM, TIOCSCTTY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from guestd.configuration import Agent
    from guestd.workload.cgroup import Cgroup


def launch(agent: Agent, cgroup: Cgroup, output: int) -> tuple[int, Record | None]:
    """The pid of the agent, which writes to `output`, a terminal if it has a session; with its end when its program could not be
    executed.
    """
    reports, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(agent, cgroup, output, report)
    os.close(report)
    with open(reports, "rb") as stream:
        # Ends with the execve: the other end closes itself.
        told = stream.read()
    return pid, Record(FAILED, **json.loads(told)) if told else None


def _become(agent: Agent, cgroup: Cgroup, output: int, report: int) -> NoReturn:
    def prepare() -> tuple[str, list[str], dict[str, str]]:
        enter_confinement(cgroup)
        _connect(output, is_terminal=bool(agent.session))
        become_agent()
        term = SESSION_TERM if agent.session else ""
        return agent.workdir, agent.command, build_environment(agent.env, term=term, secrets=agent.secrets)

    become_program(prepare, report)


def _connect(output: int, *, is_terminal: bool) -> None:
    """One place to write to; nothing to read but a terminal's keys. Descriptors above 2 close themselves at the execve."""
    if is_terminal:
        fcntl.ioctl(output, TIOCSCTTY, 0)
    os.dup2(output if is_terminal else os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
