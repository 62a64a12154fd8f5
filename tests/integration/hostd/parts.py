"""One host on simulated drivers, restartable: the machine room and the state folder live on, hostd does not."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Interface
from pathlib import Path

from fleet.model.assignment import Assignment
from fleet.model.host import Accelerator
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Agent, Goal, Network, NetworkMode, Phase, SandboxSpec, SandboxStatus, Source
from hostd.drivers.image import ImageStore, SourceStore
from hostd.drivers.simulated import (
    Faults,
    PlannedFaults,
    SimulatedDisks,
    SimulatedHypervisor,
    SimulatedLinks,
    SimulatedNetwork,
)
from hostd.drivers.simulated_guest import Behaviour, follow_command
from hostd.orders import Orders
from hostd.reconcile.apply import Applier, Drivers, Place
from hostd.reconcile.loop import Reconciler
from hostd.reconcile.progress import render_status
from hostd.reconcile.session import Sessions
from hostd.reconcile.state import Observed

A, B = SandboxId("aaaaaaaaaaaa"), SandboxId("bbbbbbbbbbbb")
HOST = HostId("host-1")
ACME = Tenant("acme")
BRIDGE = IPv4Interface("10.77.0.3/29")
FILES = {"kernel": "vmlinuz", "initramfs": "initramfs.img", "root": "root.erofs"}


def put_image(images_dir: Path) -> Digest:
    """A whole image of a few bytes."""
    files = {
        role: {"path": name, "digest": "sha256:" + hashlib.sha256(role.encode()).hexdigest()}
        for role, name in FILES.items()
    }
    manifest = json.dumps({"link_version": 2, "cmdline": "quiet", "files": files}).encode()
    digest = Digest("sha256:" + hashlib.sha256(manifest).hexdigest())
    folder = images_dir / digest.replace(":", "-")
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(manifest)
        for role, name in FILES.items():
            (folder / name).write_text(role)
    return digest


@dataclass
class Room:
    """What outlives hostd: disk, network, domains with their guests, and the time."""

    folder: Path
    faults: Faults = field(default_factory=PlannedFaults)
    behave: Behaviour = follow_command
    now_s: float = 1_000.0

    def __post_init__(self) -> None:
        self.hypervisor = SimulatedHypervisor(self.faults)
        self.network = SimulatedNetwork(self.faults)
        self.disks = SimulatedDisks(self.faults)
        self.image = put_image(self.folder / "images")
        for name in ("run", "log"):
            (self.folder / name).mkdir(exist_ok=True)

    def order(
        self,
        *commands: str,
        sandbox_id: SandboxId = A,
        goal: Goal = Goal.RUN,
        mode: NetworkMode = NetworkMode.CLOSED,
        sources: tuple[Source, ...] = (),
        generation: int = 1,
        run: int = 1,
    ) -> Assignment:
        """An order whose agents run these commands."""
        agents = tuple(
            Agent(f"agent-{index}", "custom", tuple(command.split()))
            for index, command in enumerate(commands or ("make",))
        )
        spec = SandboxSpec("box", network=Network(mode), sources=sources, agents=agents)
        return Assignment(sandbox_id, ACME, HOST, spec, self.image, 64, goal, generation, 1, 1, run)

    async def observe(self, folders: frozenset[SandboxId]) -> Observed:
        """What is on the host now, without hostd."""
        return Observed(
            domains=dict(await self.hypervisor.list_domains()),
            network=await self.network.observe(),
            scratch_disks=await self.disks.list_scratch(),
            folders=folders,
        )


class Hostd:
    """One run of hostd in a room."""

    def __init__(
        self,
        room: Room,
        links: type[SimulatedLinks] = SimulatedLinks,
        orders: Orders | None = None,
        may_begin: Callable[[SandboxId], bool] = lambda _sandbox_id: True,
    ) -> None:
        self.room = room
        self.orders = orders or Orders(room.folder / "state")
        self.links = links(room.hypervisor, room.behave, room.faults)
        self._moved = asyncio.Event()
        self.sessions = Sessions(
            self.orders, self.links, self._on_guest, self.now_ms, clock=self.clock, may_begin=may_begin
        )
        images, sources = ImageStore(room.folder / "images"), SourceStore(room.folder / "sources")
        drivers = Drivers(room.hypervisor, room.network, room.disks, images, sources)
        place = Place(room.folder / "run", room.folder / "log", 29, Accelerator.SIMULATED)
        applier = Applier(drivers, self.orders, self.sessions, place, self.now_ms)
        self.reconciler = Reconciler(
            self.orders, drivers, applier, self.sessions, self.now_ms, bridge=BRIDGE, clock=self.clock, interval_s=0.2
        )
        self.passes = 0
        self.reconciler.on_pass(self._on_pass)
        room.hypervisor.on_change(self.reconciler.nudge)

    def now_ms(self) -> int:
        return int(self.room.now_s * 1000)

    def clock(self) -> float:
        return self.room.now_s

    def pass_time(self, seconds: float) -> None:
        """Time goes on, and hostd looks."""
        self.room.now_s += seconds
        self.reconciler.nudge()

    async def listen_for(self, seconds: float) -> None:
        """Time goes on in steps, and hostd looks at each: it was there all the time."""
        for elapsed in range(0, int(seconds), 5):
            self.pass_time(min(5, seconds - elapsed))
            await self.until_pass()

    def accept(self, order: Assignment) -> None:
        self.reconciler.accept(order)

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Returns when it is so; looked at whenever anything moved."""
        while not is_so():
            await self._moved.wait()
            self._moved.clear()

    async def until_pass(self) -> None:
        """Returns when hostd has looked at least once more."""
        # The first may have begun before it was asked for.
        for looked in (self.passes, self.passes + 1):
            self.reconciler.nudge()
            await self.until(lambda looked=looked: self.passes > looked)

    async def until_phase(self, phase: Phase, sandbox_id: SandboxId = A) -> SandboxStatus:
        await self.until(lambda: self.status(sandbox_id).phase is phase)
        return self.status(sandbox_id)

    async def until_released(self, sandbox_id: SandboxId = A) -> None:
        await self.until(lambda: self.reconciler.is_released(sandbox_id))

    async def until_gone(self, sandbox_id: SandboxId = A) -> None:
        await self.until(lambda: sandbox_id not in self.orders.folders() and self.reconciler.is_released(sandbox_id))

    def status(self, sandbox_id: SandboxId = A) -> SandboxStatus:
        order, progress = self.orders.orders[sandbox_id], self.orders.progress[sandbox_id]
        return render_status(order, progress, accelerator="simulated", is_released=False, now_ms=1)

    def output(self, agent: str = "agent-0") -> bytes:
        return self.orders.output_path(A, agent).read_bytes()

    def steps_taken(self) -> list[str]:
        return [stage.name for stage in self.orders.progress[A].stages]

    def _on_pass(self) -> None:
        self.passes += 1
        self._moved.set()

    def _on_guest(self) -> None:
        self._moved.set()
        self.reconciler.nudge()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Hostd"]:
        """hostd works, and then is killed: nothing is tidied up."""
        runner = asyncio.create_task(self.reconciler.run())
        try:
            yield self
        finally:
            runner.cancel()
            await asyncio.wait([runner])
            await self.links.close()
            await self.room.hypervisor.close()
            assert runner.cancelled(), runner.exception()
