"""One simulated fleet from one seed: programs, clients and faults, and the end at which everything must be in order."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fleet.codec import encode
from fleet.model.budget import ROOT_ACCOUNT, Budget
from fleet.model.host import Capacity
from fleet.model.ids import HostId, SandboxId, Tenant
from fleet.model.sandbox import Amounts, Limits
from fleet.store import keyspace
from fleet.store.memory import MemoryStore
from fleet.store.port import Committed, Put, Unmoved, Write
from hostd.reconcile.state import DomainState
from simulation import clocks, machines
from simulation.calm import Calm
from simulation.checker import HISTORY_SHOWN, Checker, ViolationError
from simulation.clients import Clients, Fleet, Papers
from simulation.faults import TROUBLED_S, Fault, draw_faults
from simulation.loop import WORLD, VirtualLoop, current_process, thaw
from simulation.machines import CAPACITY, HostProgram, Program, SchedulerProgram

# After the last fault: time to wait out a fence, list everything again and place it; then to remove it all.
QUIET_S = 150.0
REMOVAL_S = 90.0
# A seed takes some 50,000 steps; one that needs many times that spins.
STEPS_MAX = 5_000_000
LEASES_LOOK_S = 0.5
# Of a fleet's 24: what clients ask for is often more.
BUDGET_VCPUS = 12


@dataclass(frozen=True, slots=True)
class Settings:
    """How large the fleet is, and how much its clients do."""

    schedulers: int = 3
    hosts: int = 4
    sandboxes: int = 14


@dataclass(slots=True)
class Outcome:
    """What became of one seed; `digest` is of its whole history."""

    seed: int
    steps: int
    digest: str
    faults: tuple[Fault, ...]
    violation: ViolationError | None = None
    history: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def invariant(self) -> str:
        """The name of what was violated; empty when nothing was."""
        return self.violation.invariant if self.violation is not None else ""


class WatchedStore(MemoryStore):
    """The store, which tells the checker of every write with its writer."""

    def __init__(self, clock: Callable[[], float], checker: Checker) -> None:
        super().__init__(clock)
        self._checker = checker

    async def transact(self, conditions: Sequence[Unmoved], writes: Sequence[Write]) -> Committed:
        """All of the writes, or none."""
        who, leader = current_process().name, self._keys.get(keyspace.LEADER)
        is_alive = keyspace.alive_key(HostId(who)) in self._keys
        committed = await super().transact(conditions, writes)
        if committed.is_committed:
            self._checker.committed(who, writes, leader, is_alive=is_alive)
        return committed


class World:
    """A fleet and its clients."""

    def __init__(
        self, seed: int, folder: Path, papers: Papers, settings: Settings, faults: Sequence[Fault] | None = None
    ) -> None:
        self.seed = seed
        self.chance = Random(seed)
        self._history = hashlib.sha256()
        self._lines: list[str] = []
        self._kinds: Counter[str] = Counter()
        self.checker = Checker(self.tell)
        self.loop = VirtualLoop(self.checker.check)  # type: ignore[abstract]
        self._papers, self._settings = papers, settings
        self.store = WatchedStore(self.loop.time, self.checker)
        self.schedulers = [
            SchedulerProgram(f"scheduler-{number}", self.loop, self._draw(), self.store, lambda: None)
            for number in range(settings.schedulers)
        ]
        self.hosts = [
            HostProgram(
                f"host-{number}",
                self.loop,
                self._draw(),
                self.store,
                lambda: None,
                folder=folder,
                tls=papers.host,
                began=self.checker.agents_began,
            )
            for number in range(settings.hosts)
        ]
        for host in self.hosts:
            self._watch(host)
        names = [one.name for one in self.schedulers], [one.name for one in self.hosts]
        self.faults = draw_faults(self._draw(), *names) if faults is None else tuple(faults)
        self._programs: dict[str, Program] = {one.name: one for one in (*self.schedulers, *self.hosts)}
        fleet = Fleet(self.loop, self.schedulers, self.hosts, self.checker, self.tell)
        self._clients = Clients(fleet, papers, self._draw(), settings.sandboxes)
        self._is_calm = False
        # What befalls a host at its next start of a VM.
        self._at_start: dict[str, Callable[[], None]] = {}

    def _draw(self) -> Random:
        return Random(self.chance.getrandbits(64))

    def tell(self, line: str) -> None:
        """Adds a line to the history."""
        entry = f"{self.loop.time():10.4f} {line}"
        self._history.update(entry.encode() + b"\n")
        self._lines.append(entry)
        if len(self._lines) > 4 * HISTORY_SHOWN:
            del self._lines[: -2 * HISTORY_SHOWN]

    def run(self) -> Outcome:
        """The whole story; a violation is in the outcome."""
        found: ViolationError | None = None
        hosts = {host.name: host for host in self.hosts}
        machines.install(hosts.get)
        with clocks.running(self.loop.monotonic_s, self.loop.wall_s, self._draw()):
            try:
                self._live()
            except ViolationError as violation:
                found = violation
        return Outcome(
            self.seed,
            self.loop.steps,
            self._history.hexdigest(),
            self.faults,
            found,
            self._lines[-HISTORY_SHOWN:],
            self._kinds,
        )

    def _live(self) -> None:
        loop = self.loop
        loop.spawn(WORLD, self._tick())
        for program in self._programs.values():
            program.start()
        loop.spawn(WORLD, self._strike_all())
        loop.spawn(WORLD, self._bind())
        self._clients.begin()
        loop.run_until(TROUBLED_S, STEPS_MAX)
        self._mend()
        loop.run_until(TROUBLED_S + QUIET_S, STEPS_MAX)
        calm, programs = Calm(loop, self.checker, self.store._keys, self.hosts), list(self._programs.values())
        calm.check_crashes(programs)
        calm.check_began()
        calm.check_quiet()
        self._clients.destroy_all()
        loop.run_until(TROUBLED_S + QUIET_S + REMOVAL_S, STEPS_MAX)
        calm.check_crashes(programs)
        calm.check_gone()

    def _watch(self, host: HostProgram) -> None:
        hypervisor = host.room.hypervisor
        hypervisor.watch(lambda sandbox_id: self._domain_changed(host, sandbox_id))
        capacity = Capacity(CAPACITY.vcpus, CAPACITY.memory_mib, CAPACITY.disk_mib, CAPACITY.sandboxes)
        self.checker.capacities[host.host_id] = capacity
        self.checker.has_order_on_disk = {one.host_id: one.has_order for one in getattr(self, "hosts", [])}

    def _domain_changed(self, host: HostProgram, sandbox_id: SandboxId) -> None:
        self.checker.domain_changed(host.host_id, host.room.hypervisor, sandbox_id)
        if sandbox_id in host.room.hypervisor.domains and host.name in self._at_start:
            self._at_start.pop(host.name)()

    async def _bind(self) -> None:
        """Half of the fleets have a budget for their tenant."""
        if self.seed % 2:
            tenant, limits = Tenant("demo"), Limits(Amounts(vcpus=BUDGET_VCPUS))
            self.checker.budget_vcpus = BUDGET_VCPUS
            budget = Budget(tenant, ROOT_ACCOUNT, ROOT_ACCOUNT, limits, "operator", 0)
            await self.store.transact([], [Put(keyspace.budget_key(tenant, ROOT_ACCOUNT), encode(budget))])

    async def _tick(self) -> None:
        """What happens without any program: leases end, guards look."""
        while True:
            await asyncio.sleep(LEASES_LOOK_S)
            if self.store.is_reachable:
                self.store.expire_leases()
            for host in self.hosts:
                has_any = bool(host.room.hypervisor.domains)
                if host.room.guard.look() and has_any:
                    self.tell(f"{host.name} its guard has ended what ran")

    async def _strike_all(self) -> None:
        for fault in self.faults:
            await asyncio.sleep(max(0.0, fault.at_s - self.loop.time()))
            self._kinds[fault.kind] += 1
            self.tell(f"FAULT {fault.kind} {fault.target} for {fault.lasts_s} s")
            self.loop.spawn(WORLD, self._strike(fault))

    async def _strike(self, fault: Fault) -> None:
        if fault.target == "store":
            await self._strike_store(fault)
            return
        program = self._programs[fault.target]
        lurks = {"freeze_at_commit": self._freeze_at_commit, "long_cut_at_start": self._cut_at_start}.get(fault.kind)
        if lurks is not None:
            lurks(program, fault)
            return
        match fault.kind.removeprefix("long_"):
            case "crash":
                program.kill()
            case "freeze":
                program.process.freeze()
            case "cut":
                self._cut(program, up=True, down=True)
            case "cut_up":
                self._cut(program, up=True)
            case "cut_down":
                self._cut(program, down=True)
            case "flap":
                await self._flap(program, fault)
            case "clock_jump":
                program.jump(fault.arg % 7200 - 3600)
            case "lossy":
                program.way.loss_permille = 100
            case "slow":
                program.way.latency_s = 0.3
            case _ if isinstance(program, HostProgram):
                self._strike_host(program, fault)
        await asyncio.sleep(fault.lasts_s)
        self._heal(program, fault)

    def _freeze_at_commit(self, program: Program, fault: Fault) -> None:
        """The program stands still when it has just sent a transaction, or is about to: as late as a stale one can be."""

        def freeze() -> None:
            if not self._is_calm:
                program.process.freeze()
                self.tell(f"{program.name} stands still in a commit")
                self._later(fault.lasts_s, lambda: thaw(self.loop, program.process))

        program.way.on_commit = freeze

    def _cut_at_start(self, program: Program, fault: Fault) -> None:
        """The way to the store is cut at the moment when a VM starts: before anybody there can know of it."""

        def cut() -> None:
            if not self._is_calm:
                self.tell(f"{program.name} is cut off at a start")
                self._cut(program, up=True, down=True)
                self._later(fault.lasts_s, lambda: self._heal(program, fault))

        self._at_start[program.name] = cut

    def _later(self, delay_s: float, do: Callable[[], None]) -> None:
        async def wait() -> None:
            await asyncio.sleep(delay_s)
            do()

        self.loop.spawn(WORLD, wait())

    def _strike_host(self, host: HostProgram, fault: Fault) -> None:
        match fault.kind:
            case "reboot":
                host.reboot()
            case "lose_state":
                host.lose_state()
                self.checker.lost_state.add(host.name)
            case "disk_full":
                host.room.is_full = True
            case "vm_death":
                domains = sorted(host.room.hypervisor.domains)
                if domains:
                    host.room.hypervisor.set_state(domains[fault.arg % len(domains)], DomainState.DEAD)

    def _heal(self, program: Program, fault: Fault) -> None:
        match fault.kind.removeprefix("long_"):
            case "freeze":
                thaw(self.loop, program.process)
            case "cut" | "cut_up" | "cut_down" | "cut_at_start" | "flap":
                program.way.is_up_cut = program.way.is_down_cut = False
            case "lossy":
                program.way.loss_permille = 0
            case "slow":
                program.way.latency_s = 0.002
            case "disk_full" if isinstance(program, HostProgram):
                program.room.is_full = False
            case _:
                program.start()

    def _cut(self, program: Program, *, up: bool = False, down: bool = False) -> None:
        program.way.is_up_cut, program.way.is_down_cut = up or program.way.is_up_cut, down or program.way.is_down_cut
        self.loop.call_later(8.0, lambda: program.way.break_watches() if program.way.is_down_cut else None)

    async def _flap(self, program: Program, fault: Fault) -> None:
        for number in range(6):
            self._cut(program, up=number % 2 == 0, down=number % 3 == 0)
            await asyncio.sleep(fault.lasts_s / 6)
            program.way.is_up_cut = program.way.is_down_cut = False
            program.way.break_watches()

    async def _strike_store(self, fault: Fault) -> None:
        leader = self.store._keys.get(keyspace.LEADER)
        program = self._programs.get(leader.value.decode()) if leader is not None else None
        match fault.kind:
            case "store_down":
                self.store.is_reachable = False
                await asyncio.sleep(min(fault.lasts_s, 20.0))
                self.store.is_reachable = True
            case "compact":
                for one in self._programs.values():
                    one.way.break_watches()
                await self.store.compact(self.store._revision)
            case "break_watches":
                for one in self._programs.values():
                    one.way.break_watches()
            case "kill_leader" if program is not None:
                program.kill()
                await asyncio.sleep(fault.lasts_s)
                program.start()
            case "freeze_committing_leader" if program is not None:
                self._freeze_at_commit(program, fault)
            case "freeze_leader" if program is not None:
                program.process.freeze()
                await asyncio.sleep(fault.lasts_s)
                thaw(self.loop, program.process)

    def _mend(self) -> None:
        """All faults are over."""
        self._is_calm = self._clients.is_calm = True
        self.tell("CALM")
        self.store.is_reachable = True
        for program in self._programs.values():
            thaw(self.loop, program.process)
            program.way.is_up_cut = program.way.is_down_cut = False
            program.way.loss_permille, program.way.latency_s, program.way.on_commit = 0, 0.002, None
            if isinstance(program, HostProgram):
                program.room.is_full = False
            program.start()
