"""A control plane to measure: a real etcd and a real scheduler, each its own process under mutual TLS; the hosts are simulated.

Real: etcd (one member, its data on the machine's disk, fsync as always), the scheduler's program, gRPC over mutual TLS with the
certificates of roles, every transaction and watch. Simulated, in one process: the hosts. They register as hostd does, follow
their orders through one watch for all of them, and publish for each order a status, each host in a transaction of its own on the
condition that its alive key stands. They have no VMs, and one lease together.

As a program, `python -m benchmarks.plane FOLDER ENDPOINT HOSTS`, these hosts; SIGTERM ends them, and they write when each status
was in etcd.
"""

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bedplate.host.v1 import service_pb2 as host_pb2
from bedplate.host.v1 import service_pb2_grpc as host_grpc
from fleet.codec import decode, encode
from fleet.identity import SCHEDULER_SERVER_NAME, Role
from fleet.model.assignment import Assignment
from fleet.model.host import Accelerator, Capacity, HostAlive, HostImage, HostRecord
from fleet.model.ids import Digest, HostId
from fleet.model.sandbox import NetworkMode, Phase, SandboxStatus
from fleet.rpc import open_channel
from fleet.store.etcd import open_etcd
from fleet.store.keyspace import ASSIGNMENTS, alive_key, host_key, status_key
from fleet.store.port import EventKind, Put, Store, Unmoved, WatchEvent, Write
from provisioning.embedded.etcd import LOOPBACK, free_ports, start_etcd
from provisioning.embedded.pki import create_pki, tls_files
from provisioning.embedded.process import Program, start_program

BASE = Digest("sha256:" + "b" * 64)
IMAGE = "base:latest"
# A host of two sockets as racks have them: 100 sandboxes of half a GiB to four.
CAPACITY = Capacity(vcpus=128, memory_mib=384 * 1024, disk_mib=4 * 1024 * 1024, sandboxes=120)
# All hosts are registered in transactions of so many, and publish in so many at a time.
REGISTERED_AT_ONCE = 50
PUBLISHED_AT_ONCE = 64
# The hosts' lease must outlive a benchmark: renewing is measured nowhere here.
LEASE_S = 3600.0
RACK_HOSTS = 40
# What offers no event is looked at this often.
LOOK_S = 1.0
# etcd's data must lie on a disk: fsync is what a durable placement waits for.
ON_DISK = "/var/tmp"
READY = "hosts-ready"
ACKNOWLEDGED = "hosts-acknowledged.json"

_CONFIG = """listen = "{listen}"
etcd = ["{etcd}"]
name = "bench"
log_level = "warning"

[tls]
ca = "{tls.ca}"
certificate = "{tls.certificate}"
key = "{tls.key}"

[limits]
sandboxes_per_tenant = 1000000
writes_at_once = 1000000
writes_per_s = 100000
submissions_max = 20000
"""


@dataclass(slots=True)
class Plane:
    """A running control plane; its files lie in `folder`."""

    folder: Path
    address: str
    endpoint: str
    etcd: Program
    wrapper: tuple[str, ...] = ()
    scheduler: Program | None = None

    @property
    def pki(self) -> Path:
        """The certificates."""
        return self.folder / "pki"

    def pids(self) -> dict[str, int]:
        """The programs that are measured."""
        running = {"scheduler": self.scheduler, "etcd": self.etcd}
        return {name: program.pid for name, program in running.items() if program is not None}

    def start_scheduler(self) -> Program:
        """Starts the scheduler, without waiting until it serves."""
        files = tls_files(self.pki, Role.SCHEDULER, "scheduler")
        config = self.folder / "scheduler.toml"
        config.write_text(_CONFIG.format(listen=self.address, etcd=self.endpoint, tls=files))
        command = [*self.wrapper, sys.executable, "-m", "scheduler", "--config", str(config)]
        self.scheduler = start_program("scheduler", command, self.folder / "scheduler.log", lambda: True)
        return self.scheduler


# As `python -m scheduler`, with its profile written at its end.
_PROFILED = """
import cProfile, runpy, sys
target = sys.argv[1]
sys.argv = sys.argv[sys.argv.index("-m") + 1:]
profile = cProfile.Profile()
try:
    profile.runcall(runpy.run_module, sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    profile.dump_stats(target)
"""


def profiled(file: str | None) -> tuple[str, ...]:
    """What is put before the scheduler's command so that its profile (cProfile) is in `file` at its end."""
    return (sys.executable, "-c", _PROFILED, file) if file else ()


@contextmanager
def running_plane(
    wrapper: tuple[str, ...] = (), *, is_scheduling: bool = True, below: str = ON_DISK
) -> Iterator[Plane]:
    """etcd and, if it is to, a scheduler, started and ended; `wrapper` is put before its command, to profile it.

    All files, etcd's data among them, lie in a folder of its own `below` one that is there.
    """
    with tempfile.TemporaryDirectory(prefix="bedplate-plane-", dir=below) as name:
        folder = Path(name)
        create_pki(folder / "pki")
        client_port, peer_port, port = free_ports(3)
        etcd = start_etcd(folder / "etcd", folder / "pki", client_port, peer_port)
        plane = Plane(folder, f"{LOOPBACK}:{port}", f"{LOOPBACK}:{client_port}", etcd, wrapper)
        try:
            if is_scheduling:
                plane.start_scheduler()
            yield plane
        finally:
            if plane.scheduler is not None:
                plane.scheduler.stop()
            etcd.stop()


async def known_alive(plane: Plane, hosts: int, timeout_s: float) -> None:
    """Returns when the scheduler sees so many hosts alive."""
    tls = tls_files(plane.pki, Role.OPERATOR, "operator")
    async with open_channel(plane.address, tls, SCHEDULER_SERVER_NAME) as channel:
        stub: Any = host_grpc.HostServiceStub(channel)
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    listed = await stub.ListHosts(host_pb2.ListHostsRequest(), wait_for_ready=True)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                else:
                    if sum(one.is_alive for one in listed.hosts) == hosts:
                        return
                await asyncio.sleep(LOOK_S)


@contextmanager
def simulated_hosts(plane: Plane, count: int) -> Iterator[Path]:
    """So many hosts; the path is where they say, once ended, when each sandbox's status was in etcd."""
    ready = plane.folder / READY
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.plane", str(plane.folder), plane.endpoint, str(count)]
    hosts = start_program("hosts", command, plane.folder / "hosts.log", ready.exists)
    try:
        yield plane.folder / ACKNOWLEDGED
    finally:
        hosts.stop()


def host_id(number: int) -> HostId:
    """The name of a simulated host."""
    return HostId(f"rack{number // RACK_HOSTS:03}-{number % RACK_HOSTS:02}")


def host_record(number: int) -> HostRecord:
    """A simulated host."""
    return HostRecord(
        host_id=host_id(number),
        address=f"{LOOPBACK}:1",
        capacity=CAPACITY,
        labels=(),
        images=(HostImage(IMAGE, BASE),),
        accelerator=Accelerator.KVM,
        accelerator_reason="simulated for a benchmark",
        network_modes=(NetworkMode.NONE, NetworkMode.CLOSED),
        version="0.1.0",
        registered_at_ms=1,
    )


class Crowd:
    """Hosts without VMs: registered, alive, and obedient."""

    def __init__(self, store: Store, count: int) -> None:
        self._store = store
        self._count = count
        self._alive: dict[HostId, int] = {}
        self._gate = asyncio.Semaphore(PUBLISHED_AT_ONCE)
        self._publishing: set[asyncio.Task[None]] = set()
        self.acknowledged: dict[str, float] = {}

    async def register(self) -> int:
        """All hosts are there; the revision after which their orders are to be followed."""
        lease_id = await self._store.grant_lease(LEASE_S)
        revision = 0
        for start in range(0, self._count, REGISTERED_AT_ONCE):
            writes: list[Write] = []
            numbers = range(start, min(start + REGISTERED_AT_ONCE, self._count))
            for number in numbers:
                alive = HostAlive(host_id(number), "boot", 1)
                writes.append(Put(host_key(host_id(number)), encode(host_record(number))))
                writes.append(Put(alive_key(host_id(number)), encode(alive), lease_id))
            revision = (await self._store.transact([], writes)).revision
            self._alive.update((host_id(number), revision) for number in numbers)
        return revision

    async def follow(self, revision: int) -> None:
        """Publishes a status for each order, until cancelled."""
        async with self._store.watch(ASSIGNMENTS, revision + 1) as batches:
            async for batch in batches:
                self._obey(batch)

    def _obey(self, batch: Sequence[WatchEvent]) -> None:
        orders: dict[HostId, list[Assignment]] = {}
        for event in batch:
            if event.kind is EventKind.PUT:
                order = decode(Assignment, event.value)
                orders.setdefault(order.host_id, []).append(order)
        for host, own in orders.items():
            publishing = asyncio.create_task(self._publish(host, own))
            self._publishing.add(publishing)
            publishing.add_done_callback(self._publishing.discard)

    async def _publish(self, host: HostId, orders: list[Assignment]) -> None:
        writes = [Put(status_key(host, order.sandbox_id), encode(_status(order))) for order in orders]
        async with self._gate:
            committed = await self._store.transact([Unmoved(alive_key(host), self._alive[host])], writes)
        if not committed.is_committed:
            raise RuntimeError(f"host {host} is not alive any more")
        now_s = time.monotonic()
        self.acknowledged.update((order.sandbox_id, now_s) for order in orders)


def _status(order: Assignment) -> SandboxStatus:
    now_ms = time.time_ns() // 1_000_000
    return SandboxStatus(order.sandbox_id, order.host_id, order.generation, Phase.STARTING, at_ms=now_ms, run=order.run)


async def _be_hosts(folder: Path, endpoint: str, count: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    store = open_etcd([endpoint], tls_files(folder / "pki", Role.SCHEDULER, "scheduler"))
    crowd = Crowd(store, count)
    following = asyncio.create_task(crowd.follow(await crowd.register()))
    (folder / READY).touch()
    await asyncio.wait([following, asyncio.ensure_future(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
    if following.done():
        following.result()
    following.cancel()
    (folder / ACKNOWLEDGED).write_text(json.dumps(crowd.acknowledged))
    await store.close()


if __name__ == "__main__":
    asyncio.run(_be_hosts(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
