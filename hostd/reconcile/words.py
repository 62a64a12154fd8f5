"""What host and guest say to each other, as values: the configuration to send, and what a guest's fields may mean. PURE.

The guest is hostile: a number is a whole number within its limits or ValueError, a text is cut and printable.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, is_digest
from fleet.model.sandbox import Agent, AgentPhase, AgentStatus, Artifact, Reason, Stage, StageName
from fleet.model.units import MIB
from hostd.reconcile.state import mac_address

LINK_VERSION = 2
# What one agent may print. Far more than anyone reads, little enough that a thousand sandboxes do not fill a host's disk.
OUTPUT_BYTES_MAX = 64 * MIB
ARTIFACT_BYTES_MAX = 1024 * MIB
ARTIFACT_CHANGES_MAX = 200_000
TEXT_CHARS_MAX = 500
# A guest that is not configured after a day is none of ours any more.
UPTIME_MS_MAX = 24 * 3600 * 1000
# Offsets are bounded by what is held; this only keeps numbers within 64 bits.
OFFSET_MAX = 2**62
EXIT_CODE_MAX = 255
SIGNAL_MAX = 64
RESTARTS_MAX = 2**31 - 1

_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_PHASES = {
    "running": AgentPhase.RUNNING,
    "restarting": AgentPhase.RESTARTING,
    "exited": AgentPhase.FAILED,
    "timed-out": AgentPhase.TIMED_OUT,
    "failed": AgentPhase.FAILED,
}


def describe_configuration(order: Assignment, address: str, prefix_length: int, now_ms: int) -> dict[str, Any]:
    """The fields of `configure`; admission has made sure that they fit into one frame. `address` is empty without a device."""
    sources = [
        {
            "serial": f"source-{index}",
            "guest_path": source.guest_path,
            "readonly": source.readonly,
            "digest": source.digest,
        }
        for index, source in enumerate(order.spec.sources)
    ]
    return {
        "sandbox_id": order.sandbox_id,
        "hostname": order.spec.name,
        "address": _describe_address(address, prefix_length) if address else None,
        "sources": sources,
        "agents": [_describe_agent(agent) for agent in order.spec.agents],
        "secrets": list(order.spec.secrets),
        "run": order.run,
        "clock_ms": now_ms,
    }


def parse_whole(fields: Mapping[str, Any], name: str, most: int = OFFSET_MAX) -> int:
    """The whole number from 0 to `most` in a field; raises KeyError or ValueError when it is anything else."""
    value = fields[name]
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is no whole number from 0 to {most}")
    return value


def parse_boot(fields: Mapping[str, Any], now_ms: int) -> tuple[Stage, ...]:
    """When the guest's kernel, its first process and its real root began, by its own clock; raises ValueError."""
    boot = fields.get("boot")
    if not isinstance(boot, Mapping):
        return ()
    kernel_ms = now_ms - parse_whole(boot, "uptime_ms", UPTIME_MS_MAX)
    init_ms, root_ms = (parse_whole(boot, name, UPTIME_MS_MAX) for name in ("init_ms", "root_ms"))
    return (
        Stage(StageName.KERNEL_STARTED, kernel_ms),
        Stage(StageName.INIT_STARTED, min(now_ms, kernel_ms + init_ms)),
        Stage(StageName.ROOT_MOUNTED, min(now_ms, kernel_ms + root_ms)),
    )


def parse_optional(fields: Mapping[str, Any], name: str, most: int) -> int | None:
    """The same for a field that may be absent or null."""
    return None if fields.get(name) is None else parse_whole(fields, name, most)


def parse_artifact(fields: Mapping[str, Any]) -> Artifact:
    """The artifact that a chunk belongs to; raises KeyError or ValueError past its limits."""
    digest, size_bytes = fields["digest"], parse_whole(fields, "size", ARTIFACT_BYTES_MAX)
    if not isinstance(digest, str) or not is_digest(digest) or size_bytes == 0:
        raise ValueError("an artifact without a digest or without a byte")
    return Artifact(Digest(digest), size_bytes, parse_whole(fields, "changes", ARTIFACT_CHANGES_MAX))


def parse_agent(known: AgentStatus, fields: Mapping[str, Any], now_ms: int) -> AgentStatus | None:
    """An agent's new status, None for a state of a later version; raises ValueError when its numbers are none."""
    phase = _PHASES.get(str(fields.get("state", ""))[:TEXT_CHARS_MAX])
    if phase is None:
        return None
    restarts = max(known.restarts, parse_optional(fields, "restarts", RESTARTS_MAX) or 0)
    started = replace(known, started_at_ms=known.started_at_ms or now_ms, restarts=restarts)
    if phase is AgentPhase.RUNNING:
        return replace(started, phase=phase, exit_code=None, signal=None, ended_at_ms=0, reason=None)
    exit_code, signal = parse_optional(fields, "exit_code", EXIT_CODE_MAX), parse_optional(fields, "signal", SIGNAL_MAX)
    if fields["state"] == "exited" and exit_code is None and not signal:
        raise ValueError("an agent that exited has neither exit code nor signal")
    is_known = known.phase is phase and known.restarts == restarts
    ended_at_ms = known.ended_at_ms if is_known else now_ms
    ended = replace(started, exit_code=exit_code, signal=signal, ended_at_ms=ended_at_ms)
    if fields["state"] == "exited" and exit_code == 0 and not signal:
        return replace(ended, phase=AgentPhase.COMPLETED, reason=None)
    return replace(ended, phase=phase, reason=_agent_reason(phase, ended, clean(fields.get("message") or "")))


def parse_failure(fields: Mapping[str, Any]) -> Reason:
    """Why a guest says that it cannot go on."""
    code = fields.get("code")
    is_code = isinstance(code, str) and _CODE.fullmatch(code) is not None
    next_step = "mend what it says, or see the console log on the host; then submit it again"
    return Reason(str(code) if is_code else "guest_failed", clean(fields.get("message", "")), next_step)


def clean(text: Any) -> str:
    """A text of a guest for people: short, and nothing in it that moves a cursor."""
    return "".join(char if char.isprintable() else " " for char in str(text)[:TEXT_CHARS_MAX])


def _agent_reason(phase: AgentPhase, status: AgentStatus, message: str) -> Reason:
    if phase is AgentPhase.TIMED_OUT:
        return Reason("agent_timed_out", f"agent {status.name} ran into its timeout", "raise timeout in the jcard")
    if phase is AgentPhase.RESTARTING and status.exit_code == 0 and not status.signal:
        how = "exited with code 0 and is started again"
    elif status.signal:
        how = f"ended by signal {status.signal}"
    else:
        how = "could not run" if status.exit_code is None else f"exited with code {status.exit_code}"
    text = f"agent {status.name} {how}" + (f": {message}" if message else "")
    code = "agent_restarting" if phase is AgentPhase.RESTARTING else "agent_failed"
    return Reason(code, text, f"read its output: mb logs NAME {status.name}")


def _describe_address(address: str, prefix_length: int) -> dict[str, Any]:
    return {"ip": address, "prefix": prefix_length, "mac": mac_address(IPv4Address(address))}


def _describe_agent(agent: Agent) -> dict[str, Any]:
    return {
        "name": agent.name,
        "command": list(agent.command),
        "workdir": agent.workdir,
        "env": [[variable.name, variable.value] for variable in agent.env],
        "timeout_s": agent.timeout_s,
        "grace_period_s": agent.grace_period_s,
        "memory_mib": agent.memory_mib,
        "pids_max": agent.pids_max,
        "restart": str(agent.restart),
        "max_restarts": agent.max_restarts,
        "session": agent.session,
        "output_max_bytes": OUTPUT_BYTES_MAX,
    }
