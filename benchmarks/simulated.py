"""A second host whose VMs are simulated, so that more of them fit than the machine's memory: what hostd itself takes with them.

The process is hostd with every part real (etcd, gRPC, orders, journal, publishing) but for the drivers of hypervisor, network,
disks and links, which are those of hostd.drivers.simulated; each simulated guest sends a heartbeat as often as guestd does.
Started by measure_simulated as `python -m benchmarks.simulated FOLDER`.
"""

import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import RUN_TIMEOUT_S, run_mb, wait_phase, watch_idle
from fleet.identity import Role
from fleet.model.host import Accelerator
from fleet.model.ids import HostId, SandboxId
from fleet.store.etcd import open_etcd
from fleet.telemetry import configure_logging
from hostd.config import HostdConfig
from hostd.daemon import Parts, run_daemon
from hostd.drivers.image import ImageStore, SourceStore
from hostd.drivers.ports import LinkMessage, LinkReceiver
from hostd.drivers.simulated import (
    SimulatedDisks,
    SimulatedGuard,
    SimulatedHypervisor,
    SimulatedLinks,
    SimulatedNetwork,
)
from hostd.guard import boottime_ms
from hostd.inventory import CapacitySettings, InventorySettings
from hostd.orders import Orders
from hostd.reconcile.apply import Drivers
from hostd.room import Room
from hostd.sourcing import Sourcing
from provisioning.embedded.etcd import LOOPBACK, free_ports
from provisioning.embedded.fleet import EmbeddedFleet
from provisioning.embedded.pki import SECOND_HOST, tls_files
from provisioning.embedded.process import start_program

LABEL = "simulated"
HEARTBEAT_S = 5.0
_JCARD = """name = "many"
[resources]
cpus = 1
memory = "256MiB"
disk = "64MiB"
[requires]
kind = "simulated"
[agent]
name = "worker"
harness = "custom"
command = ["sleep", "3600"]
workdir = "/tmp"
memory = "128MiB"
"""


def measure_simulated(fleet: EmbeddedFleet, folder: Path, count: int, idle_s: float) -> dict[str, Any]:
    """hostd with `count` idle VMs that are simulated: CPU, memory, and how long it took until all of them ran."""
    if not count:
        return {}
    (port,) = free_ports(1)
    _write_settings(fleet, folder / LABEL, port, count)
    log = folder / f"{LABEL}.log"
    arguments = [sys.executable, "-m", "benchmarks.simulated", str(folder / LABEL)]
    program = start_program(LABEL, arguments, log, lambda: '"host.registered"' in log.read_text())
    project = folder / "many"
    project.mkdir()
    (project / "jcard.toml").write_text(_JCARD)
    names = [f"many-{number}" for number in range(count)]
    try:
        started = time.monotonic()
        for name in names:
            run_mb(fleet, "up", str(project), "--detach", "--name", name)
        for name in names:
            wait_phase(fleet, name, "running")
        running_s = time.monotonic() - started
        found = watch_idle({"hostd": program.pid, "scheduler": fleet.scheduler.pid}, idle_s)
        for name in names:
            run_mb(fleet, "destroy", name, "--no-wait")
        _wait_gone(fleet)
    finally:
        program.stop()
    return {f"idle, {count} simulated VMs": {**found, "until all ran": {"seconds": round(running_s, 1)}}}


class BeatingLinks:
    """Simulated links whose guests also send heartbeats."""

    def __init__(self, hypervisor: SimulatedHypervisor) -> None:
        self._links = SimulatedLinks(hypervisor)
        self._beats: dict[SandboxId, asyncio.Task[None]] = {}

    def attach(self, sandbox_id: SandboxId, link_path: str, receive: LinkReceiver) -> None:
        """Keep a session up, and beat."""
        self._links.attach(sandbox_id, link_path, receive)
        if sandbox_id not in self._beats:
            self._beats[sandbox_id] = asyncio.create_task(_beat(sandbox_id, receive))

    async def send(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        """Send one message."""
        await self._links.send(sandbox_id, message)

    async def detach(self, sandbox_id: SandboxId) -> None:
        """End the session."""
        beat = self._beats.pop(sandbox_id, None)
        if beat is not None:
            beat.cancel()
        await self._links.detach(sandbox_id)

    async def close(self) -> None:
        """Detach from every guest."""
        for sandbox_id in tuple(self._beats):
            await self.detach(sandbox_id)
        await self._links.close()


async def _beat(sandbox_id: SandboxId, receive: LinkReceiver) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        await receive(sandbox_id, LinkMessage("heartbeat", {"uptime_s": time.monotonic(), "memory_used_mib": 90}))


def _write_settings(fleet: EmbeddedFleet, folder: Path, port: int, count: int) -> None:
    folder.mkdir()
    pki = fleet.folder / "pki"
    settings = {"pki": str(pki), "etcd": fleet.endpoint, "port": port, "count": count}
    settings["images"] = next(
        line.split('"')[1] for line in (fleet.folder / "hostd.toml").read_text().splitlines() if "images_dir" in line
    )
    (folder / "settings.json").write_text(json.dumps(settings))


def _wait_gone(fleet: EmbeddedFleet) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while json.loads(run_mb(fleet, "ls", "--json")):
        if time.monotonic() > deadline:
            raise TimeoutError(f"simulated sandboxes were still there after {RUN_TIMEOUT_S:.0f} s")
        time.sleep(1)


async def _serve(folder: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    tls = tls_files(Path(settings["pki"]), Role.HOST, SECOND_HOST)
    capacity = CapacitySettings(vcpus=settings["count"], sandboxes=settings["count"])
    config = HostdConfig(
        host_id=SECOND_HOST,
        etcd=(settings["etcd"],),
        tls=tls,
        listen=f"{LOOPBACK}:{settings['port']}",
        images_dir=Path(settings["images"]),
        state_dir=folder / "state",
        run_dir=folder / "run",
        log_dir=folder / "log",
        inventory=InventorySettings(capacity, {"kind": LABEL}),
    )
    await serve_simulated(config, SimulatedHypervisor())


async def serve_simulated(config: HostdConfig, hypervisor: SimulatedHypervisor) -> None:
    """hostd with that configuration and machine room, until SIGTERM."""
    for path in (config.state_dir, config.run_dir, config.log_dir):
        path.mkdir(exist_ok=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    host_id = HostId(config.host_id)
    store = open_etcd(config.etcd, config.tls)
    images, sources = ImageStore(config.images_dir), SourceStore(config.state_dir / "sources")
    orders = Orders(config.state_dir)
    room = Room(host_id, store, sources, config.sources, named=orders.named_sources)
    sourcing = Sourcing(host_id, store, sources, config.tls, room)
    drivers = Drivers(hypervisor, SimulatedNetwork(), SimulatedDisks(), images, sourcing)
    links = BeatingLinks(hypervisor)
    reason = "no VM runs here: domains are simulated"
    parts = Parts(
        config,
        store,
        orders,
        drivers,
        links,
        SimulatedGuard(hypervisor, boottime_ms),
        images,
        sources,
        sourcing,
        room,
        Accelerator.SIMULATED,
        reason,
    )
    try:
        await run_daemon(parts, stop)
    finally:
        await links.close()
        await store.close()


if __name__ == "__main__":
    configure_logging(LABEL, "info")
    asyncio.run(_serve(Path(sys.argv[1])))
