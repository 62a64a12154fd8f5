"""Turns a forked child into the agent: no privilege, an environment built from nothing, then its program."""

from __future__ import annotations

import json
import os
import resource
import signal

from guestd import AGENT_ID
from guestd.kernel import set_no_new_privileges
from guestd.workload.files import FAILED, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    from guestd.configuration import Agent
    from guestd.workload.cgroup import Cgroup

# As shells have it: no such program, and a program that cannot be executed.
NOT_FOUND, NOT_EXECUTABLE = 127, 126

_BASE = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/home/agent",
    "USER": "agent",
    "LOGNAME": "agent",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
}


def build_environment(env: Mapping[str, str]) -> dict[str, str]:
    """All that an agent finds in its environment: a base for every agent, and what its spec names."""
    return {**_BASE, **env}


def launch(agent: Agent, cgroup: Cgroup, output: int) -> tuple[int, Record | None]:
    """The pid of the agent, which writes to `output`; with its end when its program could not be executed."""
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
    code_if_missing, step = NOT_EXECUTABLE, "it cannot be confined"
    try:
        _confine(cgroup, output)
        step = f"its working directory {agent.workdir} cannot be entered"
        os.chdir(agent.workdir)
        code_if_missing, step = NOT_FOUND, f"its program {agent.command[0]} cannot be executed"
        os.execvpe(agent.command[0], agent.command, build_environment(agent.env))  # noqa: S606
    except (OSError, ValueError) as error:
        code = code_if_missing if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        reason = error.strerror if isinstance(error, OSError) else error
        os.write(report, json.dumps({"exit_code": code, "message": f"{step}: {reason}"}).encode())
    finally:
        os._exit(NOT_EXECUTABLE)


def _confine(cgroup: Cgroup, output: int) -> None:
    """Everything that must be so before the agent's program runs. Descriptors above 2 close themselves at the execve."""
    cgroup.enter()
    os.setsid()
    with open("/proc/self/oom_score_adj", "w") as stream:
        stream.write("0")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Python ignores these two, and what is ignored stays so over an execve.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.setgroups([])
    os.setresgid(AGENT_ID, AGENT_ID, AGENT_ID)
    os.setresuid(AGENT_ID, AGENT_ID, AGENT_ID)
    set_no_new_privileges()
