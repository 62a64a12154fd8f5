"""What host reports cost one scheduler: 5,000 hosts with 20 sandboxes each publish meters and changes of statuses.

Real: etcd, the scheduler's program, every put and watch, mutual TLS. Simulated: the hosts and their sandboxes, which are written
into etcd as scheduler and hostd write them (record, id, name, order, reservation, status), and one process that publishes as all
hosts: each a meter every 15 s with the counters of its sandboxes, and a change of one sandbox's status as often; the hosts' lease
is one and is not renewed. Measured over the time that `--seconds` says, once the scheduler has read everything: its CPU and
memory, and the lag from the moment at which a host publishes a status to the moment at which a client's WatchSandbox shows it.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from benchmarks.measure import cpu_s, describe_machine, keep_result, render, resident_mib, summary
from benchmarks.plane import BASE, IMAGE, Plane, host_id, host_record, known_alive, profiled, running_plane
from fleet.codec import encode
from fleet.identity import SCHEDULER_SERVER_NAME, Role
from fleet.model.assignment import Assignment
from fleet.model.budget import Meter, MeterEntry
from fleet.model.host import HostAlive, Reservation
from fleet.model.ids import SandboxId, Tenant
from fleet.model.sandbox import (
    Agent,
    AgentPhase,
    AgentStatus,
    Goal,
    ImageRef,
    Phase,
    Resources,
    SandboxRecord,
    SandboxSpec,
    SandboxStatus,
    Totals,
)
from fleet.rpc import open_channel
from fleet.store import keyspace
from fleet.store.etcd import open_etcd
from fleet.store.port import TRANSACTION_OPS_MAX, Put, Store, Write
from provisioning.embedded.etcd import LOOPBACK
from provisioning.embedded.pki import EMBEDDED_TENANT, tls_files

GOAL_CORES = 0.5
# As often as hostd publishes what its sandboxes have used (docs/decisions on budgets).
METER_PERIOD_S = 15.0
PROBE_PERIOD_S = 0.5
SEEDED_AT_ONCE = 24
PUBLISHED_AT_ONCE = 64
SMALL = Resources(vcpus=1, memory_mib=512, disk_mib=1024)
ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
LEASE_S = 3600.0
# Reading half a million keys takes a scheduler half a minute.
READ_TIMEOUT_S = 600.0
# So many tenants share the fleet; of each a host has some sandboxes side by side.
TENANTS, OF_ONE_TENANT = 50, 5


def main() -> int:
    """Measures and prints; 0 when the scheduler stayed within half a core."""
    parser = argparse.ArgumentParser("benchmarks.reports", description=__doc__)
    parser.add_argument("--hosts", type=int, default=5000, help="hosts (%(default)s)")
    parser.add_argument("--sandboxes", type=int, default=20, help="sandboxes of each host (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure (%(default)s)")
    parser.add_argument("--profile", metavar="FILE", help="profile the scheduler with cProfile into FILE")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="also keep the result in benchmarks/results")
    options = parser.parse_args()
    with running_plane(profiled(options.profile), is_scheduling=False) as plane:
        measured = asyncio.run(_measure(plane, options))
    found = {"machine": describe_machine(), "goal": {"scheduler_cores": GOAL_CORES}, "reports": measured}
    if options.save:
        keep_result("reports", found)
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0 if measured["scheduler"]["cores"] <= GOAL_CORES else 1


async def _measure(plane: Plane, options: argparse.Namespace) -> dict[str, Any]:
    store = open_etcd([plane.endpoint], tls_files(plane.pki, Role.SCHEDULER, "scheduler"))
    started = time.monotonic()
    await _seed(store, options.hosts, options.sandboxes)
    seeded_s = time.monotonic() - started
    scheduler = plane.start_scheduler()
    try:
        started = time.monotonic()
        await known_alive(plane, options.hosts, READ_TIMEOUT_S)
        read_s = time.monotonic() - started
        reports = _Reports(store, options.hosts, options.sandboxes)
        # What the start has left over is over.
        await reports.run(METER_PERIOD_S)
        before, started = cpu_s(scheduler.pid), time.monotonic()
        etcd_before, published = cpu_s(plane.etcd.pid), reports.published
        probe = asyncio.create_task(_probe(plane, store, options.seconds))
        await reports.run(options.seconds)
        took_s = time.monotonic() - started
        return {
            "fleet": {
                "hosts": options.hosts,
                "sandboxes": options.hosts * options.sandboxes,
                "reports_per_s": round((reports.published - published) / took_s, 1),
            },
            "start": {"seeded_s": round(seeded_s, 1), "scheduler_reads_s": round(read_s, 1)},
            "scheduler": {
                "cores": round((cpu_s(scheduler.pid) - before) / took_s, 3),
                "resident_mib": resident_mib(scheduler.pid),
            },
            "etcd": {"cores": round((cpu_s(plane.etcd.pid) - etcd_before) / took_s, 3)},
            "lag, seconds": summary(await probe),
        }
    finally:
        scheduler.stop()
        await store.close()


class _Reports:
    """All hosts' publishing: each one's turn comes once in a period."""

    def __init__(self, store: Store, hosts: int, sandboxes: int) -> None:
        self._store = store
        self._hosts = hosts
        self._sandboxes = sandboxes
        self._gate = asyncio.Semaphore(PUBLISHED_AT_ONCE)
        self._turn = 0
        self.published = 0

    async def run(self, duration_s: float) -> None:
        """Publishes for so long, at an even pace."""
        loop = asyncio.get_running_loop()
        started, first = loop.time(), self._turn
        async with asyncio.TaskGroup() as group:
            while (elapsed_s := loop.time() - started) < duration_s:
                due = first + int(elapsed_s * self._hosts / METER_PERIOD_S)
                while self._turn < due:
                    group.create_task(self._publish(self._turn))
                    self._turn += 1
                await asyncio.sleep(0.02)

    async def _publish(self, turn: int) -> None:
        host, period = turn % self._hosts, 1 + turn // self._hosts
        used = Totals(period * 15_000, period * 15_000, 0, period * 1_000_000)
        entries = tuple(
            MeterEntry(_sandbox(host, slot), _tenant(host, slot), 1, used) for slot in range(self._sandboxes)
        )
        meter = Meter(host_id(host), period, time.time_ns() // 1_000_000, entries)
        changed = _status(host, period % self._sandboxes, period)
        async with self._gate:
            for put in (Put(keyspace.meter_key(host_id(host)), encode(meter)), changed):
                await self._store.transact([], [put])
                self.published += 1


async def _probe(plane: Plane, store: Store, duration_s: float) -> list[float]:
    """How long a status takes from its publishing to a client that watches: of one sandbox, every PROBE_PERIOD_S."""
    lags: list[float] = []
    async with open_channel(
        plane.address, tls_files(plane.pki, Role.OPERATOR, "operator"), SCHEDULER_SERVER_NAME
    ) as channel:
        stub: Any = service_pb2_grpc.SandboxServiceStub(channel)
        watch = stub.WatchSandbox(service_pb2.GetSandboxRequest(sandbox=_sandbox(0, 0)))
        await watch.read()
        deadline, count = time.monotonic() + duration_s, 1_000_000
        while time.monotonic() < deadline:
            count += 1
            put, sent_s = _status(0, 0, count), time.monotonic()
            await store.transact([], [put])
            while (await watch.read()).status.at_ms != count:
                pass
            lags.append(time.monotonic() - sent_s)
            await asyncio.sleep(PROBE_PERIOD_S)
        watch.cancel()
    return lags


async def _seed(store: Store, hosts: int, sandboxes: int) -> None:
    """Everything that is there when so many sandboxes run."""
    lease_id = await store.grant_lease(LEASE_S)
    gate = asyncio.Semaphore(SEEDED_AT_ONCE)

    async def put(writes: list[Write]) -> None:
        async with gate:
            await store.transact([], writes)

    batch: list[Write] = []
    async with asyncio.TaskGroup() as group:
        for host in range(hosts):
            for write in _keys_of(host, sandboxes, lease_id):
                batch.append(write)
                if len(batch) == TRANSACTION_OPS_MAX:
                    group.create_task(put(batch))
                    batch = []
            await asyncio.sleep(0)
        group.create_task(put(batch))


def _keys_of(host: int, sandboxes: int, lease_id: int) -> Iterator[Put]:
    name = host_id(host)
    yield Put(keyspace.host_key(name), encode(host_record(host)))
    yield Put(keyspace.alive_key(name), encode(HostAlive(name, "boot", 1)), lease_id)
    overhead = 200
    held = Reservation(name, sandboxes, sandboxes * (512 + overhead), sandboxes * 1024, sandboxes)
    yield Put(keyspace.reservation_key(name), encode(held))
    for slot in range(sandboxes):
        sandbox_id, tenant = _sandbox(host, slot), _tenant(host, slot)
        agent = Agent("worker", "custom", ("sleep", "3600"), memory_mib=256)
        spec = SandboxSpec(f"box-{host}-{slot}", ImageRef(IMAGE), SMALL, agents=(agent,))
        record = SandboxRecord(sandbox_id, tenant, spec, Goal.RUN, 1, 1)
        order = Assignment(sandbox_id, tenant, name, spec, BASE, overhead, Goal.RUN, 1, 1, 1)
        yield Put(keyspace.record_key(tenant, sandbox_id), encode(record))
        yield Put(keyspace.id_key(sandbox_id), tenant.encode())
        yield Put(keyspace.name_key(tenant, spec.name), sandbox_id.encode())
        yield Put(keyspace.assignment_key(name, sandbox_id), encode(order))
        yield _status(host, slot, 1)


def _status(host: int, slot: int, at_ms: int) -> Put:
    agents = (AgentStatus("worker", AgentPhase.RUNNING, output_bytes=at_ms, started_at_ms=1),)
    said = SandboxStatus(
        _sandbox(host, slot), host_id(host), 1, Phase.RUNNING, agents=agents, address=f"{LOOPBACK}", at_ms=at_ms
    )
    return Put(keyspace.status_key(said.host_id, said.sandbox_id), encode(said))


def _sandbox(host: int, slot: int) -> SandboxId:
    number, letters = host * 1000 + slot, []
    for _ in range(12):
        number, place = divmod(number, len(ALPHABET))
        letters.append(ALPHABET[place])
    return SandboxId("".join(letters))


def _tenant(host: int, slot: int) -> Tenant:
    return Tenant(f"{EMBEDDED_TENANT}-{(host + slot // OF_ONE_TENANT) % TENANTS}")


if __name__ == "__main__":
    sys.exit(main())
