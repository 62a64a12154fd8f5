"""What guestd is, in memory: a guest that answers messages with messages. Deterministic: no clock, no chance; knows no link."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hostd.drivers.ports import LinkMessage
from hostd.drivers.simulated_programs import SimulatedPrograms
from hostd.reconcile.words import LINK_VERSION

# docs/guest-link.md: the largest payload, and how far a guest may send ahead of the last ack.
PAYLOAD_BYTES_MAX = 256 * 1024
AHEAD_BYTES_MAX = 1024 * 1024
SIGTERM = 15


@dataclass(frozen=True, slots=True)
class AgentScript:
    """What a simulated agent does: print `output`, then exit, or run on until it is stopped (`exit_code` None)."""

    output: bytes = b"done\n"
    exit_code: int | None = 0


# From an agent's entry in `configure` (docs/guest-link.md) to what it does.
Behaviour = Callable[[Mapping[str, Any]], AgentScript]


def follow_command(agent: Mapping[str, Any]) -> AgentScript:
    """The usual behaviour: ["exit", "3"] exits with 3, ["sleep"] runs until it is stopped, all else prints a line."""
    match list(agent["command"]):
        case ["exit", code]:
            return AgentScript(exit_code=int(code))
        case ["sleep", *_]:
            return AgentScript(exit_code=None)
        case _:
            return AgentScript()


@dataclass(slots=True)
class _Stream:
    """Bytes on their way to the host: sent as far as `sent`, durable there as far as `acked`."""

    content: bytes = b""
    sent: int = 0
    acked: int = 0

    def resume(self, offset: int) -> None:
        self.sent = self.acked = min(max(offset, 0), len(self.content))

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """What may be sent now, by offset."""
        end = min(len(self.content), self.acked + AHEAD_BYTES_MAX)
        while self.sent < end:
            offset, self.sent = self.sent, min(end, self.sent + PAYLOAD_BYTES_MAX)
            yield offset, self.content[offset : self.sent]


@dataclass(slots=True)
class _SimulatedAgent:
    output: _Stream
    exit_code: int | None
    signal: int | None = None
    is_told: bool = False

    @property
    def has_ended(self) -> bool:
        return self.exit_code is not None or self.signal is not None

    def state(self) -> dict[str, Any]:
        """The agent's fields in `hello` and `agent`."""
        ended = {"exit_code": self.exit_code, "signal": self.signal}
        name = "exited" if self.has_ended else "running"
        return {"state": name, "offset": len(self.output.content), **(ended if self.has_ended else {})}


@dataclass(slots=True)
class SimulatedGuest:
    """What guestd is: it answers messages with messages, and keeps its state over every session."""

    boot_id: str
    behave: Behaviour
    is_configured: bool = False
    is_resumed: bool = False
    artifact: _Stream | None = None
    sources: list[dict[str, Any]] = field(default_factory=list)
    agents: dict[str, _SimulatedAgent] = field(default_factory=dict)
    programs: SimulatedPrograms = field(default_factory=SimulatedPrograms)
    secrets: dict[str, bytes] = field(default_factory=dict)
    _artifact_offset: int = 0

    def greet(self) -> LinkMessage:
        """The first message of a session."""
        self.is_resumed = False
        self.programs.clear()
        for agent in self.agents.values():
            agent.is_told = agent.has_ended
        states = {name: agent.state() for name, agent in self.agents.items()}
        about = {"version": LINK_VERSION, "guestd": "simulated", "boot_id": self.boot_id}
        return LinkMessage("hello", {**about, "configured": self.is_configured, "agents": states})

    def take(self, message: LinkMessage) -> list[LinkMessage]:
        """The answers to one message; an unknown type has none."""
        answers = []
        if message.type.startswith("exec"):
            return self.programs.take(message)
        match message.type:
            case "secret" if not self.is_configured:
                self.secrets[message.fields["name"]] = message.payload
            case "configure" if not self.is_configured:
                answers += self._configure(message.fields)
            case "resume":
                self._resume(message.fields)
            case "ack":
                self._acknowledge(message.fields)
            case "collect":
                self._collect()
            case "stop":
                self._stop()
        return answers + self._flush()

    def _configure(self, fields: Mapping[str, Any]) -> list[LinkMessage]:
        if set(fields["secrets"]) != set(self.secrets):
            return [LinkMessage("failed", {"code": "secrets_missing", "message": "a secret has no value"})]
        self.is_configured = True
        self.sources = list(fields["sources"])
        for agent in fields["agents"]:
            script = self.behave(agent)
            content = script.output[: agent["output_max_bytes"]]
            self.agents[agent["name"]] = _SimulatedAgent(_Stream(content), script.exit_code)
        return [LinkMessage("agent", {"name": name, "state": "running"}) for name in self.agents]

    def _resume(self, fields: Mapping[str, Any]) -> None:
        self.is_resumed = True
        for name, offset in fields["agents"].items():
            self.agents[name].output.resume(offset)
        self._artifact_offset = fields["artifact"]

    def _acknowledge(self, fields: Mapping[str, Any]) -> None:
        stream = self.artifact if fields.get("artifact") else self.agents[fields["agent"]].output
        if stream is not None:
            stream.acked = max(stream.acked, fields["offset"])

    def _collect(self) -> None:
        self.artifact = _Stream(pack_nothing(self.sources))
        self.artifact.resume(self._artifact_offset)

    def _stop(self) -> None:
        for agent in self.agents.values():
            if not agent.has_ended:
                agent.signal = SIGTERM

    def _flush(self) -> list[LinkMessage]:
        """All that may be sent now: output, ends of agents once their output is out, the artifact."""
        if not self.is_resumed:
            return []
        messages = []
        for name, agent in self.agents.items():
            for offset, content in agent.output.chunks():
                messages.append(LinkMessage("output", {"agent": name, "offset": offset}, content))
            if agent.has_ended and not agent.is_told and agent.output.sent == len(agent.output.content):
                agent.is_told = True
                messages.append(LinkMessage("agent", {"name": name, **agent.state()}))
        if self.artifact is not None:
            whole = self.artifact.content
            about = {"size": len(whole), "digest": "sha256:" + hashlib.sha256(whole).hexdigest(), "changes": 0}
            messages += [
                LinkMessage("artifact", {**about, "offset": offset}, content)
                for offset, content in self.artifact.chunks()
            ]
        return messages


def pack_nothing(sources: list[dict[str, Any]]) -> bytes:
    """The artifact of a guest that changed nothing: always the same bytes for the same sources."""
    kept = [{key: source[key] for key in ("guest_path", "digest") if key in source} for source in sources]
    changes = {"version": 1, "sources": [{**source, "changes": []} for source in kept]}
    content = json.dumps(changes).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("changes.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()
