"""A program that runs in a sandbox at mb's request: what is asked for, what is sent to it, what comes back. PURE."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fleet.errors import InvalidSpecError

ROOT = "root"
USERS = ("agent", ROOT)
# POSIX.1-2017, 8.1: names of environment variables.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A shell's way to tell that a signal ended a program (POSIX.1-2017, 2.8.2).
SIGNAL_BASE = 128


@dataclass(frozen=True, slots=True)
class Size:
    """A terminal's size in characters."""

    columns: int
    rows: int


@dataclass(frozen=True, slots=True)
class Program:
    """What to run in the sandbox `sandbox` (id or name); `terminal` is None for pipes, `workdir` empty for the first agent's."""

    sandbox: str
    command: tuple[str, ...]
    workdir: str = ""
    env: tuple[tuple[str, str], ...] = ()
    user: str = "agent"
    terminal: Size | None = None
    term: str = ""


@dataclass(frozen=True, slots=True)
class Input:
    """Bytes for its standard input; none of them: there is no more."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal for its process group, by number."""

    number: int


Sent = Input | Signal | Size


@dataclass(frozen=True, slots=True)
class Printed:
    """Bytes it wrote; with a terminal all of them are standard output."""

    payload: bytes
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended; `message` says why it could not be run, if so."""

    exit_code: int | None
    signal: int | None
    message: str


def exit_of(ended: Ended, otherwise: int) -> int:
    """The exit code that tells how a program ended: its own, 128 and the signal, or `otherwise` when it never ran."""
    if ended.signal is not None:
        return SIGNAL_BASE + ended.signal % SIGNAL_BASE
    # A guest may claim any number.
    return otherwise if ended.exit_code is None else ended.exit_code % 256


def parse_env(settings: Iterable[str], environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """`NAME=VALUE` as pairs, and `NAME` alone with its value in `environment`; raises InvalidSpecError `env_invalid`."""
    return tuple(_parse_setting(setting, environment) for setting in settings)


def _parse_setting(setting: str, environment: Mapping[str, str]) -> tuple[str, str]:
    name, equals, value = setting.partition("=")
    if not _NAME.fullmatch(name):
        raise InvalidSpecError(
            "env_invalid", f"{name!r} is no variable's name", "write --env NAME=VALUE", field="--env"
        )
    if not equals and name not in environment:
        next_step = f"write --env {name}=VALUE, or export it"
        raise InvalidSpecError("env_invalid", f"{name} is not set here", next_step, field="--env")
    return name, value if equals else environment[name]
