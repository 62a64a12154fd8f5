"""What `configure` asks for, checked. The host is trusted, its mistakes are not: a wrong field is a fault that names it. PURE."""

from __future__ import annotations

import posixpath
import re

from guestd.fault import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# What tmux takes for a name without reading more into it; none is no session.
_SESSION = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]{0,62})?")
_SERIAL = re.compile(r"[a-z0-9-]{1,20}")
SECRET_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
# When an agent that has ended is started again.
NO, ON_FAILURE, ALWAYS = "no", "on-failure", "always"
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class Source:
    """A read-only tree to mount; `about` is what the artifact says of it."""

    __slots__ = ("about", "guest_path", "readonly", "serial")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.serial = _matching(fields, "serial", _SERIAL)
        self.guest_path = _path(fields, "guest_path")
        self.readonly = bool(fields["readonly"])
        self.about = {key: str(fields[key]) for key in ("guest_path", "digest") if key in fields}


class Agent:
    """One program to run, with its limits; `timeout_s` and `max_restarts` are unlimited at 0."""

    __slots__ = (
        "command",
        "env",
        "grace_period_s",
        "max_restarts",
        "memory_mib",
        "name",
        "output_max_bytes",
        "pids_max",
        "restart",
        "secrets",
        "session",
        "timeout_s",
        "workdir",
    )

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.name = _matching(fields, "name", _NAME)
        self.command = [str(argument) for argument in fields["command"]]
        if not self.command:
            raise ValueError(f"agent {self.name} has no command")
        self.workdir = _path(fields, "workdir")
        self.env = {str(key): str(value) for key, value in fields["env"]}
        self.timeout_s = float(fields["timeout_s"])
        self.grace_period_s = float(fields["grace_period_s"])
        self.memory_mib = int(fields["memory_mib"])
        self.pids_max = int(fields["pids_max"])
        self.output_max_bytes = int(fields["output_max_bytes"])
        self.restart = str(fields.get("restart", NO))
        if self.restart not in (NO, ON_FAILURE, ALWAYS):
            raise ValueError(f"restart {self.restart[:80]!r}")
        self.max_restarts = int(fields.get("max_restarts", 0))
        self.session = _matching({"session": "", **fields}, "session", _SESSION)
        # Names; where their values lie is told to each agent.
        self.secrets: tuple[str, ...] = ()


class Address:
    """What to give to the network device with this MAC address."""

    __slots__ = ("ip", "mac", "prefix")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.ip = str(fields["ip"])
        self.prefix = int(fields["prefix"])
        self.mac = _matching(fields, "mac", _MAC)
        if not 0 <= self.prefix <= 32:
            raise ValueError(f"a prefix of {self.prefix}")


class Configuration:
    """All that this guest is to be."""

    __slots__ = ("address", "agents", "clock_ms", "hostname", "secrets", "sources")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.hostname = _matching(fields, "hostname", _NAME)
        self.clock_ms = int(fields["clock_ms"])
        self.address = Address(fields["address"]) if fields["address"] is not None else None
        self.sources = [Source(source) for source in fields["sources"]]
        self.agents = [Agent(agent) for agent in fields["agents"]]
        self.secrets = tuple(map(str, fields.get("secrets", ())))
        if not all(map(SECRET_NAME.fullmatch, self.secrets)):
            raise ValueError("a secret's name is no name of a variable")
        for agent in self.agents:
            agent.secrets = self.secrets


def parse_configuration(fields: Mapping[str, Any]) -> Configuration:
    """The configuration in a `configure` frame's fields; raises GuestFault `configuration_invalid`."""
    try:
        return Configuration(fields)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise GuestFault("configuration_invalid", f"the host's configuration cannot be used: {what}") from error


def _matching(fields: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    value = str(fields[key])
    if not pattern.fullmatch(value):
        raise ValueError(f"{key} {value[:80]!r}")
    return value


def _path(fields: Mapping[str, Any], key: str) -> str:
    value = str(fields[key])
    if not value.startswith("/") or "\0" in value or (key == "guest_path" and posixpath.normpath(value) != value):
        raise ValueError(f"{key} {value[:80]!r}")
    return value
