"""The programs of the simulation: the real scheduler without its servers, and the real hostd on a machine room of its own."""

import asyncio
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import hostd.daemon
import hostd.orders
from fleet.errors import HostFaultError, NotFoundError
from fleet.identity import TlsFiles
from fleet.model.host import Accelerator, HostImage
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.store.election import Election
from fleet.store.keyspace import LEADER, ROOT
from fleet.store.memory import MemoryStore
from fleet.store.mirror import Mirror
from hostd.config import HostdConfig
from hostd.daemon import Parts
from hostd.drivers.simulated import (
    SimulatedDisks,
    SimulatedGuard,
    SimulatedHypervisor,
    SimulatedLinks,
    SimulatedNetwork,
)
from hostd.drivers.simulated_guest import AgentScript
from hostd.files import write_durable
from hostd.inventory import CapacitySettings, InventorySettings
from hostd.orders import Orders
from hostd.reconcile.apply import Drivers
from hostd.reconcile.state import BootFiles, DomainState, Machine
from scheduler.__main__ import LEADER_TTL_S
from scheduler.api.creations import Creations
from scheduler.api.hosts import HostService
from scheduler.api.limits import WriteLimit
from scheduler.api.sandboxes import SandboxService
from scheduler.cycle import Cycle
from scheduler.quotas import Quotas
from scheduler.state import FleetState
from scheduler.submissions import Submissions
from simulation.loop import Life, Process, VirtualLoop, current_process
from simulation.wire import Way, Wire

IMAGE = Digest("sha256:" + "1" * 64)
CAPACITY = CapacitySettings(vcpus=6, memory_mib=4096, disk_mib=1024, sandboxes=5)
# hostd's own guard looks twice a second.
GUARD_LOOK_S = 0.5


class SimulatedImages:
    """One image, which every host holds."""

    async def ensure_image(self, digest: Digest) -> BootFiles:
        """Its files."""
        return BootFiles(digest, "/k", "/i", "/r", "")

    async def list_images(self, _named: object = frozenset()) -> tuple[HostImage, ...]:
        """What may be asked for by name."""
        return (HostImage("base:latest", IMAGE),)


class SlowHypervisor(SimulatedHypervisor):
    """Starts, pauses and ends of VMs take time, in which everything else goes on."""

    def __init__(self, chance: Random) -> None:
        super().__init__()
        self._chance = chance

    async def ensure_domain(self, machine: Machine) -> None:
        """Start the domain, or let a paused one run on."""
        await self._take_time()
        await super().ensure_domain(machine)

    async def pause_domain(self, sandbox_id: SandboxId) -> None:
        """Pause the domain, if it runs."""
        await self._take_time()
        await super().pause_domain(sandbox_id)

    async def remove_domain(self, sandbox_id: SandboxId) -> None:
        """End and forget the domain."""
        await self._take_time()
        await super().remove_domain(sandbox_id)

    async def _take_time(self) -> None:
        await asyncio.sleep(self._chance.choice((0.02, 0.1, 0.4, 1.5)))


class NoSources:
    """No host holds any source."""

    async def ensure_disk(self, _tenant: Tenant, _digest: Digest) -> str:
        """There is none."""
        raise NotFoundError("source_missing", "there is none", "none")

    async def tell_all(self) -> None:
        """Nothing is told."""


class Program:
    """What can be started, killed, frozen, and cut from the store."""

    def __init__(self, name: str, loop: VirtualLoop, chance: Random) -> None:
        self.name = name
        self.loop = loop
        self.way = Way(chance)
        self.process = Process(name)
        self.process.life = Life.DEAD
        self.drift = chance.choice((0.0, 0.0, 0.001, -0.001))
        self.wall_offset_s = 0.0
        self.crashes: list[BaseException] = []

    @property
    def is_alive(self) -> bool:
        """Whether it runs and is not frozen."""
        return self.process.life is Life.ALIVE

    def start(self) -> None:
        """A new process of the program, if none is there."""
        if self.process.life is not Life.DEAD:
            return
        self.process = Process(self.name, self.wall_offset_s, self.drift)
        self.loop.spawn(self.process, self._guarded())

    def kill(self) -> None:
        """As kill -9."""
        self.process.kill()

    def jump(self, seconds: float) -> None:
        """The wall clock is set."""
        self.wall_offset_s += seconds
        self.process.wall_offset_s = self.wall_offset_s

    async def body(self) -> None:
        """What it runs; raises what ends it."""
        raise NotImplementedError

    async def _guarded(self) -> None:
        process = self.process
        try:
            await self.body()
        except BaseException as error:
            self.crashes.append(error)
            process.life = Life.DEAD
            raise


class SchedulerProgram(Program):
    """A scheduler, put together as scheduler.__main__ does; calls reach it through `sandboxes` and `hosts`."""

    def __init__(
        self, name: str, loop: VirtualLoop, chance: Random, store: MemoryStore, who: Callable[[], None]
    ) -> None:
        super().__init__(name, loop, chance)
        self._store, self._who = store, who
        self.sandboxes: SandboxService | None = None
        self.hosts: HostService | None = None

    async def body(self) -> None:
        """Serves until killed."""
        store = Wire(self._store, self.way, self._who)
        quotas = Quotas(writes_at_once=1e9, writes_per_s=1e9)
        mirror = Mirror(store, ROOT)
        state = FleetState(mirror)
        clock, now_ms = self.loop.monotonic_s, self._now_ms
        election = Election(store, LEADER, self.name, LEADER_TTL_S, clock)
        election.on_won(mirror.wake)
        submissions = Submissions(quotas.submissions_max)
        cycle = Cycle(
            store, state, election.fence, now_ms, clock, submissions=submissions, quotas=quotas, leader=self.name
        )
        writes = WriteLimit(clock, quotas)
        creations = Creations(store, state, now_ms, writes, submissions=submissions, quotas=quotas)
        self.sandboxes = SandboxService(store, state, now_ms, writes, creations)
        self.hosts = HostService(store, state, now_ms)
        async with asyncio.TaskGroup() as parts:
            for part in (cycle, election, mirror):
                parts.create_task(part.run())

    def kill(self) -> None:
        """Nothing is served any more."""
        super().kill()
        self.sandboxes = self.hosts = None

    def _now_ms(self) -> int:
        return int(self.loop.wall_s() * 1000)


@dataclass(slots=True)
class Room:
    """A machine without its hostd: domains, network, disks, the guard, and whether its state disk takes anything."""

    hypervisor: SimulatedHypervisor
    network: SimulatedNetwork
    disks: SimulatedDisks
    guard: SimulatedGuard
    boots: int = 1
    is_full: bool = False


class HostProgram(Program):
    """A host: the machine, which lives on, and its hostd."""

    def __init__(
        self,
        name: str,
        loop: VirtualLoop,
        chance: Random,
        store: MemoryStore,
        who: Callable[[], None],
        *,
        folder: Path,
        tls: TlsFiles,
        began: Callable[[HostId, SandboxId], None],
    ) -> None:
        super().__init__(name, loop, chance)
        self.host_id = HostId(name)
        self._store, self._who, self._tls, self._began = store, who, tls, began
        self.folder = folder / name
        self.state_dir = self.folder / "state"
        for part in (self.state_dir, self.folder / "run", self.folder / "log"):
            part.mkdir(parents=True)
        hypervisor = SlowHypervisor(Random(chance.getrandbits(64)))
        guard = SimulatedGuard(hypervisor, lambda: int(self.boottime_s() * 1000))
        self.room = Room(hypervisor, SimulatedNetwork(), SimulatedDisks(), guard)
        self.links: SimulatedLinks | None = None
        self.orders: Orders | None = None

    def boottime_s(self) -> float:
        """The machine's monotonic clock, whoever asks."""
        return 1_000.0 + self.loop.time() * (1 + self.drift)

    def has_order(self, sandbox_id: SandboxId) -> bool:
        """Whether an order of the sandbox is on the disk."""
        return (self.state_dir / "orders" / sandbox_id).exists()

    def kill(self) -> None:
        """hostd ends; VMs run on, and nobody gates or hears of them."""
        super().kill()
        self.room.hypervisor._nudges.clear()
        self.room.hypervisor._watchers[1:] = []

    def reboot(self) -> None:
        """The machine loses its power: no VM, no tap, no run folder is left, its disks are."""
        self.kill()
        self.room.guard.forget()
        self.room.hypervisor.kill_all()
        self.room.network = SimulatedNetwork()
        self.room.boots += 1

    def lose_state(self) -> None:
        """hostd's state folder is new."""
        self.kill()
        shutil.rmtree(self.state_dir)
        self.state_dir.mkdir()

    def end_agents(self, sandbox_id: SandboxId, exit_code: int) -> None:
        """The agents of a guest end by themselves, as soon as it is heard."""
        domain = self.room.hypervisor.domains.get(sandbox_id)
        if domain is None or domain.guest is None or domain.state is not DomainState.RUNNING:
            return
        for agent in domain.guest.agents.values():
            if not agent.has_ended:
                agent.exit_code = exit_code
        if self.is_alive and self.links is not None and sandbox_id in self.links._sessions:
            self.links.break_session(sandbox_id)

    async def body(self) -> None:
        """hostd until it is killed, put together by itself."""
        room, folder = self.room, self.folder
        config = HostdConfig(
            host_id=self.name,
            etcd=("store",),
            tls=self._tls,
            listen="127.0.0.1:1",
            images_dir=folder,
            state_dir=self.state_dir,
            run_dir=folder / "run",
            log_dir=folder / "log",
            inventory=InventorySettings(CAPACITY),
        )
        self.orders = Orders(self.state_dir, self.name)
        self.links = SimulatedLinks(room.hypervisor, self._behave)
        sources: Any = NoSources()
        images: Any = SimulatedImages()
        drivers = Drivers(room.hypervisor, room.network, room.disks, images, sources)
        parts = Parts(
            config,
            Wire(self._store, self.way, self._who),
            self.orders,
            drivers,
            self.links,
            room.guard,
            images,
            sources,
            sources,
            sources,
            Accelerator.SIMULATED,
            "no VM runs here",
        )
        daemon = hostd.daemon._Daemon(parts)
        await room.network.ensure_bridge()
        record = await daemon.describe(config.listen)
        async with asyncio.TaskGroup() as tasks:
            for part in daemon.parts(record, config.listen):
                tasks.create_task(part)

    def _behave(self, agent: Mapping[str, Any]) -> AgentScript:
        _, sandbox_id, ending = agent["command"]
        self._began(self.host_id, SandboxId(sandbox_id))
        return AgentScript(b"done\n", {"runs": None, "ends": 0, "fails": 3}[ending])


def install(find_host: Callable[[str], HostProgram | None]) -> None:
    """Gives the programs what they ask the machine itself: its boot id, and whether its disk takes a file."""

    def read_boot_id() -> str:
        host = find_host(current_process().name)
        return f"boot-{host.room.boots}" if host is not None else "boot"

    def write(path: Path, content: bytes) -> None:
        host = find_host(current_process().name)
        if host is not None and host.room.is_full:
            raise HostFaultError("disk_failed", f"{path}: No space left on device", "free space on the host")
        write_durable(path, content)

    hostd.daemon.read_boot_id = read_boot_id  # type: ignore[attr-defined]
    hostd.orders.write_durable = write  # type: ignore[attr-defined]
