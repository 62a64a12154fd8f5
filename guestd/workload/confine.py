"""What a forked child does to itself before it becomes a program of the guest: no privilege, an environment built from nothing."""

from __future__ import annotations

import json
import os
import resource
import signal

from guestd import AGENT_ID
from guestd.kernel import set_no_new_privileges

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

    from guestd.workload.cgroup import Cgroup

AGENT = "agent"
ROOT = "root"
# As shells have it: no such program, and a program that cannot be executed.
NOT_FOUND, NOT_EXECUTABLE = 127, 126
# Of a name in a report, which is read at once.
NAME_CHARS_MAX = 200
# Where the values of guestd.secrets lie.
SECRETS_FOLDER = "/run/secrets"

_BASE = {
    AGENT: {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/home/agent", "USER": AGENT, "LOGNAME": AGENT},
    ROOT: {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "USER": ROOT,
        "LOGNAME": ROOT,
    },
}
_COMMON = {"SHELL": "/bin/bash", "LANG": "C.UTF-8", "TERM": "dumb"}
# Python ignores the last two and the shell that starts guestd the two before; nohup the first. What is ignored stays so over an
# execve.
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGXFSZ)


def build_environment(
    env: Mapping[str, str], *, user: str = AGENT, term: str = "", secrets: tuple[str, ...] = ()
) -> dict[str, str]:
    """All that a program finds in its environment: the user's base, where secrets lie, and what its owner names."""
    terminal = {"TERM": term} if term else {}
    paths = {f"{name}_FILE": f"{SECRETS_FOLDER}/{name}" for name in secrets}
    return {**_BASE[user], **_COMMON, **terminal, **paths, **env}


def enter_confinement(cgroup: Cgroup, *, oom_score_adj: int = 0) -> None:
    """A cgroup and a session of its own, no ignored signals, no core dumps; still root. Raises OSError."""
    cgroup.enter()
    os.setsid()
    with open("/proc/self/oom_score_adj", "w") as stream:
        stream.write(str(oom_score_adj))
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in _IGNORED:
        signal.signal(number, signal.SIG_DFL)


def become_agent() -> None:
    """The user `agent`, for good: nothing that this process executes ever gains privileges. Raises OSError."""
    os.setgroups([])
    os.setresgid(AGENT_ID, AGENT_ID, AGENT_ID)
    os.setresuid(AGENT_ID, AGENT_ID, AGENT_ID)
    set_no_new_privileges()


def become_program(prepare: Callable[[], tuple[str, list[str], dict[str, str]]], report: int) -> NoReturn:
    """Becomes the program whose working directory, command and environment `prepare` gives once it has confined this process.

    What keeps it from that is told on `report` as JSON: the shell's exit code, and a message.
    """
    code_if_missing, step = NOT_EXECUTABLE, "it cannot be confined"
    try:
        workdir, command, env = prepare()
        step = f"its working directory {workdir[:NAME_CHARS_MAX]} cannot be entered"
        os.chdir(workdir)
        code_if_missing, step = NOT_FOUND, f"its program {command[0][:NAME_CHARS_MAX]} cannot be executed"
        os.execvpe(command[0], command, env)  # noqa: S606
    except (OSError, ValueError) as error:
        code = code_if_missing if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        reason = error.strerror if isinstance(error, OSError) else error
        os.write(report, json.dumps({"exit_code": code, "message": f"{step}: {reason}"}).encode())
    finally:
        os._exit(NOT_EXECUTABLE)
