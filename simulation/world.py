"""One simulated fleet from one seed: programs, clients and faults, and the end at which everything must be in order."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from bedplate.host.v1 import service_pb2 as host_pb2
from bedplate.sandbox.v1 import service_pb2
from fleet.codec import to_message
from fleet.errors import BedplateError, ConflictError, InvalidSpecError, NotFoundError
from fleet.identity import TlsFiles
from fleet.model.host import Capacity, Reservation
from fleet.model.ids import SandboxId, make_sandbox_id
from fleet.model.sandbox import Agent, Goal, Network, NetworkMode, Resources, Restart, SandboxSpec
from fleet.store import keyspace
from fleet.store.memory import MemoryStore
from fleet.store.port import Committed, Unmoved, Write
from hostd.reconcile.state import DomainState
from simulation import clocks, machines
from simulation.checker import HISTORY_SHOWN, Checker, ViolationError
from simulation.faults import TROUBLED_S, Fault, draw_faults
from simulation.loop import WORLD, Life, Process, VirtualLoop, current_process
from simulation.machines import CAPACITY, HostProgram, Program, SchedulerProgram

# After the last fault: time to wait out a fence, list everything again and place it; then to remove it all.
QUIET_S = 150.0
REMOVAL_S = 90.0
# A seed takes some 50,000 steps; one that needs many times that spins.
STEPS_MAX = 5_000_000
LEASES_LOOK_S = 0.5
RPC_TIMEOUT_S = 6.0
EXPECTED = (ConflictError, NotFoundError, InvalidSpecError)


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
        leader = self._keys.get(keyspace.LEADER)
        committed = await super().transact(conditions, writes)
        if committed.is_committed:
            self._checker.committed(current_process().name, writes, leader)
        return committed


class Caller:
    """The context of a call of the fleet's tenant or operator."""

    def __init__(self, certificate: bytes) -> None:
        self._certificate = certificate

    def auth_context(self) -> dict[str, tuple[bytes, ...]]:
        """What TLS has verified."""
        return {"x509_pem_cert": (self._certificate,)}

    def invocation_metadata(self) -> tuple[()]:
        """None."""
        return ()


@dataclass(frozen=True, slots=True)
class Papers:
    """Certificates, made once for all seeds: nothing in a history depends on them."""

    host: TlsFiles
    tenant: bytes
    operator: bytes


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
        self.loop = VirtualLoop(self.checker.check)
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
        self._clients = Process("client")
        self._is_calm = False

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
        loop.spawn(self._clients, self._wish())
        loop.run_until(TROUBLED_S, STEPS_MAX)
        self._mend()
        loop.run_until(TROUBLED_S + QUIET_S, STEPS_MAX)
        self._check_crashes()
        self._check_began()
        self._check_quiet()
        loop.spawn(self._clients, self._destroy_all())
        loop.run_until(TROUBLED_S + QUIET_S + REMOVAL_S, STEPS_MAX)
        self._check_crashes()
        self._check_gone()

    def _watch(self, host: HostProgram) -> None:
        hypervisor = host.room.hypervisor
        hypervisor.watch(lambda sandbox_id: self.checker.domain_changed(host.host_id, hypervisor, sandbox_id))
        capacity = Capacity(CAPACITY.vcpus, CAPACITY.memory_mib, CAPACITY.disk_mib, CAPACITY.sandboxes)
        self.checker.capacities[host.host_id] = capacity
        self.checker.has_order_on_disk = {one.host_id: one.has_order for one in getattr(self, "hosts", [])}

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
        match fault.kind.removeprefix("long_"):
            case "crash":
                program.kill()
            case "freeze":
                self.loop.freeze(program.process)
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
                self.loop.thaw(program.process)
            case "cut" | "cut_up" | "cut_down" | "flap":
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
            case "freeze_leader" if program is not None:
                self.loop.freeze(program.process)
                await asyncio.sleep(fault.lasts_s)
                self.loop.thaw(program.process)

    def _mend(self) -> None:
        """All faults are over."""
        self._is_calm = True
        self.tell("CALM")
        self.store.is_reachable = True
        for program in self._programs.values():
            self.loop.thaw(program.process)
            program.way.is_up_cut = program.way.is_down_cut = False
            program.way.loss_permille, program.way.latency_s = 0, 0.002
            if isinstance(program, HostProgram):
                program.room.is_full = False
            program.start()

    async def _wish(self) -> None:
        """Clients create, stop, start and destroy, and hosts are cordoned, until the calm."""
        chance, made = self._draw(), 0
        while not self._is_calm:
            await asyncio.sleep(chance.expovariate(0.4))
            what = chance.randrange(10)
            known = sorted(id_ for id_, fact in self.checker.facts.items() if fact.is_acknowledged)
            if made < self._settings.sandboxes and what < 5:
                made += 1
                self.loop.spawn(self._clients, self._create(chance, made))
            elif known and what < 8:
                self.loop.spawn(self._clients, self._change(chance, chance.choice(known)))
            elif what == 8:
                self.loop.spawn(self._clients, self._cordon(chance))
            elif known:
                chance.choice(self.hosts).end_agents(chance.choice(known), chance.choice((0, 3)))

    async def _create(self, chance: Random, number: int) -> None:
        sandbox_id = make_sandbox_id(chance.randbytes)
        ending = chance.choice(("runs", "runs", "ends", "fails"))
        restart = chance.choice((Restart.NO, Restart.ON_FAILURE, Restart.ALWAYS))
        agent = Agent("worker", "custom", ("work", sandbox_id, ending), restart=restart, memory_mib=64)
        resources = Resources(chance.choice((1, 1, 2, 4)), chance.choice((256, 512, 1024)), 64)
        spec = SandboxSpec(f"box-{number}", resources=resources, network=Network(NetworkMode.CLOSED), agents=(agent,))
        request = service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id, spec=to_message(spec))
        if await self._call(chance, lambda one, caller: one.CreateSandbox(request, caller)):
            self.checker.acknowledged(sandbox_id)
            self.tell(f"client knows of {sandbox_id}")

    async def _change(self, chance: Random, sandbox_id: SandboxId) -> None:
        verb = chance.choice(("StopSandbox", "StopSandbox", "StartSandbox", "DestroySandbox"))
        if verb == "DestroySandbox":
            self.checker.facts[sandbox_id].is_destroy_asked = True
        request = service_pb2.GetSandboxRequest(sandbox=sandbox_id)
        self.tell(f"client {verb} {sandbox_id}")
        await self._call(chance, lambda one, caller: getattr(one, verb)(request, caller))

    async def _cordon(self, chance: Random) -> None:
        host, on = chance.choice(self.hosts), chance.randrange(2)
        self.tell(f"client {'cordons' if on else 'uncordons'} {host.name}")

        async def call() -> bool:
            served = [one.hosts for one in self.schedulers if one.is_alive and one.hosts is not None]
            if not served:
                return False
            caller = Caller(self._papers.operator)
            if on:
                await served[0].CordonHost(host_pb2.CordonHostRequest(host_id=host.name), caller)
            else:
                await served[0].UncordonHost(host_pb2.UncordonHostRequest(host_id=host.name), caller)
            return True

        try:
            await call()
        except BedplateError:
            return

    async def _call(self, chance: Random, call: Callable[[Any, Any], Awaitable[Any]]) -> bool:
        """Calls one scheduler after another until one has answered; whether it was done. Some calls come twice."""
        caller = Caller(self._papers.tenant)
        for _ in range(30):
            served = [one for one in self.schedulers if one.process.life is not Life.DEAD and one.sandboxes is not None]
            if not served:
                await asyncio.sleep(2)
                continue
            program = chance.choice(served)
            service = program.sandboxes
            answers = [
                self.loop.spawn(program.process, _answer(call(service, caller)))
                for _ in range(1 + (chance.randrange(8) == 0))
            ]
            await asyncio.wait(answers, timeout=RPC_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            done = [one.result() for one in answers if one.done()]
            if any(one is None for one in done):
                return True
            if any(isinstance(one, EXPECTED) for one in done):
                return False
            await asyncio.sleep(1 + chance.random())
        return False

    async def _destroy_all(self) -> None:
        chance = self._draw()
        for sandbox_id in sorted(self.checker.records):
            self.checker.facts[sandbox_id].is_destroy_asked = True
            request = service_pb2.GetSandboxRequest(sandbox=sandbox_id)
            await self._call(chance, lambda one, caller, request=request: one.DestroySandbox(request, caller))

    def _check_began(self) -> None:
        """A fleet in which nothing runs keeps every promise: some agents must have begun."""
        if not any(fact.starts for fact in self.checker.facts.values()):
            raise ViolationError("nothing_ran", "no agent of any sandbox has begun")

    def _check_crashes(self) -> None:
        for program in self._programs.values():
            for error in program.crashes:
                raise ViolationError("crashed", f"{program.name} ended by itself: {_flat(error)}")
        for error in self.loop.errors:
            raise ViolationError("crashed", f"a callback raised {error!r}")

    def _check_quiet(self) -> None:
        """After the calm: every wish is carried out or rightly refused, and nothing is left over."""
        checker = self.checker
        for host in self.hosts:
            self._check_room(host)
            said = checker.reservations.get(host.host_id, Reservation(host.host_id))
            taken = checker.true_sum(host.host_id)
            if (said.vcpus, said.memory_mib, said.disk_mib, said.sandboxes) != (
                *(taken.vcpus, taken.memory_mib, taken.disk_mib),
                taken.sandboxes,
            ):
                raise ViolationError("reservation_wrong", f"{host.name}: {said} is reserved, {taken} is taken")
        for sandbox_id, record in sorted(checker.records.items()):
            where = [host for (host, id_), order in checker.orders.items() if id_ == sandbox_id]
            if record.goal is Goal.REMOVE:
                raise ViolationError("not_removed", f"{sandbox_id} is still there")
            if record.goal is Goal.RUN and not where:
                self._check_refused(sandbox_id)
        for key in self.store._keys:
            if key.startswith((keyspace.STATUSES, keyspace.ASSIGNMENTS)):
                sandbox_id = key.rsplit("/", 1)[1]
                if sandbox_id not in checker.records:
                    raise ViolationError("orphan_key", f"{key} has no record")

    def _check_room(self, host: HostProgram) -> None:
        ordered = {sandbox_id for (host_id, sandbox_id) in self.checker.orders if host_id == host.host_id}
        room = host.room
        found = {
            *room.hypervisor.domains,
            *room.disks.sizes_mib,
            *room.network._taps,
            *room.network._ports,
            *(path.name for path in (host.state_dir / "sandboxes").iterdir()),
            *(path.name for path in (host.state_dir / "orders").iterdir()),
        }
        if found - ordered:
            raise ViolationError("orphan", f"{host.name} has remains of {sorted(found - ordered)}")
        for sandbox_id, domain in room.hypervisor.domains.items():
            if domain.state is not DomainState.RUNNING:
                raise ViolationError("stuck", f"{sandbox_id} on {host.name} is {domain.state} in the calm")

    def _check_refused(self, sandbox_id: SandboxId) -> None:
        """A sandbox without a host must fit on none."""
        record = self.checker.records[sandbox_id]
        resources = record.spec.resources
        if record.not_before_ms > self.loop.wall_s() * 1000:
            return
        for host in self.hosts:
            key = host.host_id
            if keyspace.cordon_key(key) in self.store._keys or keyspace.losses_key(key) in self.store._keys:
                continue
            taken, capacity = self.checker.true_sum(key), self.checker.capacities[key]
            fits = (
                taken.vcpus + resources.vcpus <= capacity.vcpus,
                taken.memory_mib + resources.memory_mib <= capacity.memory_mib,
                taken.disk_mib + resources.disk_mib <= capacity.disk_mib,
                taken.sandboxes < capacity.sandboxes,
            )
            if all(fits):
                raise ViolationError("not_placed", f"{sandbox_id} waits, and fits on {host.name}: {taken} is taken")

    def _check_gone(self) -> None:
        """After everything was destroyed nothing is there but hosts, tombstones and history."""
        kept = (keyspace.HOSTS, keyspace.ALIVE, keyspace.LEADER, keyspace.RESERVATIONS, keyspace.TOMBSTONES)
        kept = (*kept, keyspace.CORDONS, keyspace.LOSSES, keyspace.METERS, keyspace.CHARGED, keyspace.BALANCES)
        for key in sorted(self.store._keys):
            if key.startswith(keyspace.ROOT) and not key.startswith(kept):
                raise ViolationError("left_over", f"{key} is there after everything was destroyed")
        for host in self.hosts:
            self._check_room(host)
            if self.checker.true_sum(host.host_id) != Capacity(0, 0, 0, 0):
                raise ViolationError("left_over", f"something is taken of {host.name}")


async def _answer(call: Awaitable[Any]) -> BedplateError | None:
    try:
        await call
    except BedplateError as error:
        return error
    return None


def _flat(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return repr(error)
