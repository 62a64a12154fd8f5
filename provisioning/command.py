"""Runs the build's outside programs: bounded in time, with their last words in the error."""

import os
import subprocess
from pathlib import Path

from fleet.errors import HostFaultError, UnavailableError

# Enough of a program's output to see why it failed, short enough to read.
TAIL_CHARS = 2000


def run_command(
    arguments: list[str], *, timeout_s: float, cwd: Path | None = None, env: dict[str, str] | None = None
) -> str:
    """Runs a program to its end and returns what it printed to stdout.

    `env` is added to the few variables every program gets. Raises UnavailableError when the program is not installed,
    HostFaultError `command_failed` for a bad exit code or a timeout.
    """
    try:
        done = subprocess.run(
            arguments,
            cwd=cwd,
            env=_environment() | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise UnavailableError("command_not_found", f"{arguments[0]} is not installed", "run ./dev setup") from error
    except subprocess.TimeoutExpired as error:
        raise HostFaultError("command_failed", f"{arguments[0]} took longer than {timeout_s:.0f} s") from error
    if done.returncode != 0:
        tail = (done.stderr or done.stdout)[-TAIL_CHARS:].strip()
        raise HostFaultError("command_failed", f"{arguments[0]} ended with code {done.returncode}: {tail}")
    return done.stdout


def _environment() -> dict[str, str]:
    """What a build may depend on: where programs are, where proxies are, and fixed language and time zone."""
    kept = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy") or name == "TMPDIR"}
    return kept | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": "/root"}
