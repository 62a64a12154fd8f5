"""The machine in memory: every port of `ports`, for control planes in which no VM runs. Deterministic: no clock, no chance.

A SimulatedHypervisor is the machine room: its domains, and the guests in them, live on when hostd is restarted with the same
instance. SimulatedLinks belongs to one run of hostd. Faults strike where they are planned, also between two halves of a step.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fleet.errors import HostFaultError, UnavailableError
from fleet.model.host import Accelerator
from fleet.model.ids import SandboxId
from hostd.drivers.ports import LinkMessage, LinkReceiver, VmUse
from hostd.drivers.simulated_guest import Behaviour, SimulatedGuest, follow_command
from hostd.reconcile.state import DomainState, Machine, ObservedNetwork, Port


class Faults(Protocol):
    """What goes wrong and when; a simulation brings its own."""

    def strike(self, step: str, subject: str) -> None:
        """Raise HostFaultError when this step shall fail now.

        Steps: bridge rules tap domain domain_reply pause scratch link guard.
        """


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
        self._drops: dict[SandboxId, dict[str, int]] = {}
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

    def drop(self, sandbox_id: SandboxId, cause: str) -> None:
        """One more frame of a sandbox that has rules is dropped."""
        counts = self._drops.setdefault(sandbox_id, {}) if sandbox_id in self._ports else {}
        counts[cause] = counts.get(cause, 0) + 1

    async def list_drops(self) -> Mapping[SandboxId, Mapping[str, int]]:
        """What was dropped so far."""
        return {sandbox_id: dict(self._drops.get(sandbox_id, {})) for sandbox_id in self._ports}

    async def remove_port(self, sandbox_id: SandboxId) -> Mapping[str, int]:
        """The tap, then the rules; a fault between them leaves the rules."""
        self._faults.strike("tap", sandbox_id)
        self._taps.discard(sandbox_id)
        self._faults.strike("rules", sandbox_id)
        self._ports.pop(sandbox_id, None)
        return self._drops.pop(sandbox_id, {})

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
    guest: SimulatedGuest | None = None


class SimulatedHypervisor:
    """Domains that outlive hostd; `starts` counts how often each sandbox's was started, for whoever checks invariants."""

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or PlannedFaults()
        self._nudges: list[Callable[[], None]] = []
        self._watchers: list[Callable[[SandboxId], None]] = []
        self._may_run: Callable[[], bool] = lambda: True
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
            if self.domains[machine.sandbox_id].state is DomainState.PAUSED and self._may_run():
                self.set_state(machine.sandbox_id, DomainState.RUNNING)
            return
        state = DomainState.RUNNING if self._may_run() else DomainState.PAUSED
        self.domains[machine.sandbox_id] = SimulatedDomain(machine, state)
        self.starts[machine.sandbox_id] = self.starts.get(machine.sandbox_id, 0) + 1
        self._tell(machine.sandbox_id)
        self._faults.strike("domain_reply", machine.sandbox_id)

    async def pause_domain(self, sandbox_id: SandboxId) -> None:
        """Pause the domain, if it runs."""
        self._faults.strike("pause", sandbox_id)
        if sandbox_id in self.domains and self.domains[sandbox_id].state is DomainState.RUNNING:
            self.set_state(sandbox_id, DomainState.PAUSED)

    async def remove_domain(self, sandbox_id: SandboxId) -> None:
        """End and forget the domain."""
        self._faults.strike("domain", sandbox_id)
        if self.domains.pop(sandbox_id, None) is not None:
            self._tell(sandbox_id)

    async def measure(self) -> Mapping[SandboxId, VmUse]:
        """No VM takes any CPU, and each has all of its guest's memory."""
        return {sandbox_id: VmUse(0, domain.machine.memory_mib) for sandbox_id, domain in self.domains.items()}

    def set_gate(self, may_run: Callable[[], bool]) -> None:
        """Ask `may_run` before a domain runs, until close."""
        self._may_run = may_run

    def on_change(self, nudge: Callable[[], None]) -> None:
        """Call `nudge` whenever a domain changes, until close."""
        self._nudges.append(nudge)

    async def close(self) -> None:
        """Forget whom to nudge and ask; domains run on."""
        self._nudges.clear()
        self._may_run = lambda: True

    def kill_all(self) -> None:
        """What the guard does: every domain ends, without hostd."""
        for sandbox_id in tuple(self.domains):
            del self.domains[sandbox_id]
            self._tell(sandbox_id)

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


class SimulatedGuard:
    """The guard of a machine room, which outlives hostd: whoever drives the clock calls `look` as the real one looks."""

    def __init__(
        self, hypervisor: SimulatedHypervisor, now_ms: Callable[[], int], faults: Faults | None = None
    ) -> None:
        self._hypervisor = hypervisor
        self._now_ms = now_ms
        self._faults = faults or PlannedFaults()
        self._deadline_ms: int | None = None

    def arm(self, deadline_ms: int) -> None:
        """Move the deadline."""
        self._faults.strike("guard", "guard")
        self._deadline_ms = deadline_ms

    def disarm(self) -> None:
        """VMs run on."""
        self._faults.strike("guard", "guard")
        self._deadline_ms = None

    def armed_until_ms(self) -> int | None:
        """The deadline."""
        return self._deadline_ms

    def forget(self) -> None:
        """The machine boots anew: no deadline of the time before counts."""
        self._deadline_ms = None

    def look(self) -> bool:
        """Ends every domain if the deadline has passed; whether it has."""
        has_passed = self._deadline_ms is not None and self._now_ms() >= self._deadline_ms
        if has_passed:
            self._hypervisor.kill_all()
        return has_passed


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
