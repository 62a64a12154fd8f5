"""The machine in memory: every port of `ports`, for control planes in which no VM runs. Deterministic: no clock, no chance.

A SimulatedHypervisor is the machine room: its domains, and the guests in them, live on when hostd is restarted with the same
instance. SimulatedLinks belongs to one run of hostd. Faults strike where they are planned, also between two halves of a step.
"""

import asyncio
import hashlib
import io
import json
import tarfile
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fleet.errors import HostFaultError, UnavailableError
from fleet.model.host import Accelerator
from fleet.model.ids import SandboxId
from hostd.drivers.ports import LinkMessage, LinkReceiver, VmUse
from hostd.drivers.simulated_programs import SimulatedPrograms
from hostd.reconcile.state import DomainState, Machine, ObservedNetwork, Port
from hostd.reconcile.words import LINK_VERSION

# docs/guest-link.md: the largest payload, and how far a guest may send ahead of the last ack.
PAYLOAD_BYTES_MAX = 256 * 1024
AHEAD_BYTES_MAX = 1024 * 1024
SIGTERM = 15


class Faults(Protocol):
    """What goes wrong and when; a simulation brings its own."""

    def strike(self, step: str, subject: str) -> None:
        """Raise HostFaultError when this step shall fail now. Steps: bridge rules tap domain domain_reply scratch link."""


class PlannedFaults:
    """Fails the calls of each step whose numbers (from 1) are given: {"tap": {2}} fails the second tap."""

    def __init__(self, calls: Mapping[str, Collection[int]] | None = None) -> None:
        self._calls = calls or {}
        self._counts: dict[str, int] = {}

    def strike(self, step: str, subject: str) -> None:
        """Raises HostFaultError `<step>_failed` at a planned call."""
        self._counts[step] = self._counts.get(step, 0) + 1
        if self._counts[step] in self._calls.get(step, ()):
            raise HostFaultError(f"{step}_failed", f"{subject}: planned to fail", "it is retried")


class SimulatedNetwork:
    """A bridge, and which sandboxes have taps and rules on it."""

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or PlannedFaults()
        self._taps: set[SandboxId] = set()
        self._ports: dict[SandboxId, Port] = {}
        self.has_bridge = False

    async def ensure_bridge(self) -> None:
        """The bridge stands."""
        self._faults.strike("bridge", "bridge")
        self.has_bridge = True

    async def observe(self) -> ObservedNetwork:
        """Taps and rules as they are."""
        return ObservedNetwork(frozenset(self._taps), frozenset(self._ports))

    async def ensure_port(self, port: Port) -> None:
        """Rules, then the tap; a fault between them leaves the rules."""
        self._faults.strike("rules", port.sandbox_id)
        self._ports[port.sandbox_id] = port
        self._faults.strike("tap", port.sandbox_id)
        self._taps.add(port.sandbox_id)

    async def remove_port(self, sandbox_id: SandboxId) -> None:
        """The tap, then the rules; a fault between them leaves the rules."""
        self._faults.strike("tap", sandbox_id)
        self._taps.discard(sandbox_id)
        self._faults.strike("rules", sandbox_id)
        self._ports.pop(sandbox_id, None)

    async def remove_bridge(self) -> None:
        """Nothing is left."""
        self._taps.clear()
        self._ports.clear()
        self.has_bridge = False


class SimulatedDisks:
    """Scratch disks that are names and sizes."""

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or PlannedFaults()
        self.sizes_mib: dict[SandboxId, int] = {}

    async def list_scratch(self) -> frozenset[SandboxId]:
        """Sandboxes that have a scratch disk."""
        return frozenset(self.sizes_mib)

    async def ensure_scratch(self, sandbox_id: SandboxId, size_mib: int) -> str:
        """A path at which no file is; the first size stays."""
        self._faults.strike("scratch", sandbox_id)
        self.sizes_mib.setdefault(sandbox_id, size_mib)
        return f"/simulated/scratch/{sandbox_id}.raw"

    async def measure_scratch(self) -> Mapping[SandboxId, int]:
        """Every disk is empty."""
        return dict.fromkeys(self.sizes_mib, 0)

    async def keep_scratch(self, sandbox_id: SandboxId) -> None:
        """A name is durable as it is."""
        self._faults.strike("scratch", sandbox_id)

    async def remove_scratch(self, sandbox_id: SandboxId) -> None:
        """The disk is gone."""
        self._faults.strike("scratch", sandbox_id)
        self.sizes_mib.pop(sandbox_id, None)


@dataclass(slots=True)
class SimulatedDomain:
    """One domain with the guest in it, which is made when a link first reaches it."""

    machine: Machine
    state: DomainState = DomainState.RUNNING
    guest: "SimulatedGuest | None" = None


class SimulatedHypervisor:
    """Domains that outlive hostd; `starts` counts how often each sandbox's was started, for whoever checks invariants."""

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or PlannedFaults()
        self._nudges: list[Callable[[], None]] = []
        self._watchers: list[Callable[[SandboxId], None]] = []
        self.domains: dict[SandboxId, SimulatedDomain] = {}
        self.starts: dict[SandboxId, int] = {}

    async def probe_accelerator(self) -> tuple[Accelerator, str]:
        """SIMULATED, always."""
        return Accelerator.SIMULATED, "no VM runs here: domains are simulated"

    async def list_domains(self) -> Mapping[SandboxId, DomainState]:
        """Every domain, dead ones too."""
        return {sandbox_id: domain.state for sandbox_id, domain in self.domains.items()}

    async def ensure_domain(self, machine: Machine) -> None:
        """Start the domain, or let a paused one run on; the fault `domain_reply` strikes after it has started."""
        self._faults.strike("domain", machine.sandbox_id)
        if machine.sandbox_id in self.domains:
            if self.domains[machine.sandbox_id].state is DomainState.PAUSED:
                self.set_state(machine.sandbox_id, DomainState.RUNNING)
            return
        self.domains[machine.sandbox_id] = SimulatedDomain(machine)
        self.starts[machine.sandbox_id] = self.starts.get(machine.sandbox_id, 0) + 1
        self._tell(machine.sandbox_id)
        self._faults.strike("domain_reply", machine.sandbox_id)

    async def remove_domain(self, sandbox_id: SandboxId) -> None:
        """End and forget the domain."""
        self._faults.strike("domain", sandbox_id)
        if self.domains.pop(sandbox_id, None) is not None:
            self._tell(sandbox_id)

    async def measure(self) -> Mapping[SandboxId, VmUse]:
        """No VM takes any CPU, and each has all of its guest's memory."""
        return {sandbox_id: VmUse(0, domain.machine.memory_mib) for sandbox_id, domain in self.domains.items()}

    def on_change(self, nudge: Callable[[], None]) -> None:
        """Call `nudge` whenever a domain changes, until close."""
        self._nudges.append(nudge)

    async def close(self) -> None:
        """Forget whom to nudge; domains run on."""
        self._nudges.clear()

    def set_state(self, sandbox_id: SandboxId, state: DomainState) -> None:
        """What happens without hostd: a guest powers off or crashes (DEAD), an operator pauses it (PAUSED)."""
        self.domains[sandbox_id].state = state
        self._tell(sandbox_id)

    def watch(self, watcher: Callable[[SandboxId], None]) -> Callable[[], None]:
        """Call `watcher` with each domain that changes; the result ends it."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def _tell(self, sandbox_id: SandboxId) -> None:
        for watcher in tuple(self._watchers):
            watcher(sandbox_id)
        for nudge in tuple(self._nudges):
            nudge()


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


@dataclass(slots=True)
class _Session:
    """One attached sandbox: the domain it speaks with, None while no session stands, and what that has yet to read."""

    sandbox_id: SandboxId
    receive: LinkReceiver
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    inbox: deque[LinkMessage] = field(default_factory=deque)
    domain: SimulatedDomain | None = None
    runner: asyncio.Task[None] | None = None

    def break_off(self) -> None:
        """What was on its way is lost; the runner begins anew."""
        self.domain = None
        self.inbox.clear()
        self.wake.set()


class SimulatedLinks:
    """The links of one run of hostd to the guests of a SimulatedHypervisor; a crash of hostd is `close` without a word."""

    def __init__(
        self, hypervisor: SimulatedHypervisor, behave: Behaviour = follow_command, faults: Faults | None = None
    ) -> None:
        self._hypervisor = hypervisor
        self._behave = behave
        self._faults = faults or PlannedFaults()
        self._sessions: dict[SandboxId, _Session] = {}
        self._unwatch: Callable[[], None] | None = hypervisor.watch(self._wake)

    def attach(self, sandbox_id: SandboxId, link_path: str, receive: LinkReceiver) -> None:  # noqa: ARG002
        """Keep a session up whenever the domain runs; the path plays no part."""
        if sandbox_id not in self._sessions:
            session = _Session(sandbox_id, receive)
            self._sessions[sandbox_id] = session
            session.wake.set()
            session.runner = asyncio.create_task(self._run(session), name=f"simulated-link-{sandbox_id}")

    async def send(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        """Send one message; raises UnavailableError `link_down` when no session stands, or at the fault `link`, which breaks it."""
        session = self._sessions.get(sandbox_id)
        if session is None or session.domain is None or session.domain.state is DomainState.DEAD:
            raise UnavailableError("link_down", f"the guest link of {sandbox_id} is down", "it is retried")
        try:
            self._faults.strike("link", sandbox_id)
        except HostFaultError as error:
            session.break_off()
            raise UnavailableError("link_down", f"the guest link of {sandbox_id} broke", "it is retried") from error
        session.inbox.append(message)
        session.wake.set()

    async def detach(self, sandbox_id: SandboxId) -> None:
        """End the session."""
        session = self._sessions.pop(sandbox_id, None)
        if session is not None:
            session.break_off()
            if session.runner is not None and session.runner is not asyncio.current_task():
                session.runner.cancel()
                await asyncio.wait([session.runner])

    async def close(self) -> None:
        """Detach from every guest."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        for sandbox_id in tuple(self._sessions):
            await self.detach(sandbox_id)

    def break_session(self, sandbox_id: SandboxId) -> None:
        """Cut the link as a fault would; a new session follows at once."""
        self._sessions[sandbox_id].break_off()

    def _wake(self, sandbox_id: SandboxId) -> None:
        if sandbox_id in self._sessions:
            self._sessions[sandbox_id].wake.set()

    async def _run(self, session: _Session) -> None:
        while self._sessions.get(session.sandbox_id) is session:
            await session.wake.wait()
            session.wake.clear()
            domain = self._hypervisor.domains.get(session.sandbox_id)
            if domain is None or domain.state is DomainState.DEAD:
                had_session, session.domain = session.domain is not None, None
                session.inbox.clear()
                if had_session:
                    await session.receive(session.sandbox_id, LinkMessage("disconnected"))
            elif domain.state is DomainState.RUNNING:
                await self._converse(session, domain)

    async def _converse(self, session: _Session, domain: SimulatedDomain) -> None:
        if domain.guest is None:
            domain.guest = SimulatedGuest(domain.machine.generation_id, self._behave)
        if session.domain is not domain:
            session.inbox.clear()
            session.domain = domain
            await session.receive(session.sandbox_id, LinkMessage("connected"))
            await session.receive(session.sandbox_id, domain.guest.greet())
        while session.inbox and session.domain is domain and domain.state is DomainState.RUNNING:
            message = session.inbox.popleft()
            if message.type == "poweroff":
                self._hypervisor.set_state(session.sandbox_id, DomainState.DEAD)
                return
            for answer in domain.guest.take(message):
                # The other side may break the session, or end it, while it takes an answer.
                if session.domain is domain:
                    await session.receive(session.sandbox_id, answer)
