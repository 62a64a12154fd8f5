"""A real hostd on simulated drivers: its own server, table and services, with nothing of a machine behind them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic

from grpc_health.v1 import health_pb2, health_pb2_grpc

from fleet.identity import Role, host_server_name
from fleet.model.host import Accelerator
from fleet.model.ids import HostId
from fleet.rpc import open_channel
from fleet.store.memory import MemoryStore
from fleet.store.port import Store
from hostd.config import KILL, HostdConfig
from hostd.daemon import Parts, run_daemon
from hostd.drivers.image import ImageStore, SourceStore
from hostd.drivers.simulated import (
    SimulatedDisks,
    SimulatedGuard,
    SimulatedHypervisor,
    SimulatedLinks,
    SimulatedNetwork,
)
from hostd.guard import boottime_ms
from hostd.orders import Orders
from hostd.reconcile.apply import Drivers
from hostd.room import Room
from hostd.sourcing import Sourcing
from provisioning.embedded.etcd import LOOPBACK, free_ports
from provisioning.embedded.pki import EMBEDDED_HOST, tls_files

HANG_S = 20.0


@asynccontextmanager
async def running_hostd(
    pki: Path, folder: Path, store: Store | None = None, schedulers: tuple[str, ...] = (), fencing: str = KILL
) -> AsyncIterator[str]:
    """hostd serves within the context; gives its address."""
    folder.mkdir()
    host_id, tls, address = (
        HostId(EMBEDDED_HOST),
        tls_files(pki, Role.HOST, EMBEDDED_HOST),
        f"{LOOPBACK}:{free_ports(1)[0]}",
    )
    config = HostdConfig(
        host_id, (), tls, listen=address, state_dir=folder, run_dir=folder, log_dir=folder, schedulers=schedulers
    )
    config = replace(config, fencing=fencing)
    store = store or MemoryStore(monotonic)
    hypervisor, images, sources = SimulatedHypervisor(), ImageStore(folder / "images"), SourceStore(folder / "sources")
    orders = Orders(folder)
    room = Room(host_id, store, sources, config.sources, named=orders.named_sources)
    links, sourcing = SimulatedLinks(hypervisor), Sourcing(host_id, store, sources, tls, room)
    drivers = Drivers(hypervisor, SimulatedNetwork(), SimulatedDisks(), images, sourcing)
    stop = asyncio.Event()
    guard = SimulatedGuard(hypervisor, boottime_ms)
    chosen = (drivers, links, guard, images, sources, sourcing, room, Accelerator.SIMULATED, "")
    daemon = asyncio.create_task(run_daemon(Parts(config, store, orders, *chosen), stop))
    try:
        async with open_channel(address, tls, host_server_name(host_id)) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=HANG_S, wait_for_ready=True
            )
        yield address
    finally:
        stop.set()
        await daemon
        await links.close()
