"""Values to test the scheduler with: what a test does not name is a small sandbox, or a host that could carry eight of it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fleet.codec import encode
from fleet.model.assignment import Assignment
from fleet.model.host import Accelerator, Capacity, HostAlive, HostImage, HostRecord, overhead_mib
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import (
    Agent,
    Goal,
    NetworkMode,
    Phase,
    Resources,
    SandboxRecord,
    SandboxSpec,
    SandboxStatus,
    Source,
)
from fleet.store.keyspace import alive_key, host_key, id_key, name_key, record_key, source_key, status_key
from fleet.store.port import Put
from scheduler.placement.plan import Plan, plan
from scheduler.placement.snapshot import Snapshot
from scheduler.placement.upkeep import cluster_of

DEMO, OTHER = Tenant("demo"), Tenant("other")
BASE = Digest("sha256:" + "b" * 64)
SOURCE = Digest("sha256:" + "5" * 64)
SMALL = Resources(vcpus=1, memory_mib=512, disk_mib=1024)
ROOMY = Capacity(vcpus=8, memory_mib=8192, disk_mib=8192, sandboxes=8)
NOW_MS = 1_700_000_000_000


def sandbox_id(number: int) -> SandboxId:
    """The id of a test's sandbox of that number."""
    return SandboxId("sandbox" + "".join("abcdefghij"[int(digit)] for digit in f"{number:05}"))


def spec(number: int = 0, **changes: Any) -> SandboxSpec:
    """An admissible spec."""
    made = SandboxSpec(f"box-{number}", resources=SMALL, agents=(Agent("worker", "custom", ("true",), memory_mib=256),))
    return replace(made, **changes)


def source(digest: Digest = SOURCE) -> Source:
    return Source(digest, 1024, "/workspace")


def record(number: int = 0, **changes: Any) -> SandboxRecord:
    """A wish; `spec` may be changed like every other field."""
    made = SandboxRecord(sandbox_id(number), DEMO, spec(number), Goal.RUN, 1, NOW_MS + number)
    return replace(made, **changes)


def host(name: str = "one", **changes: Any) -> HostRecord:
    made = HostRecord(
        host_id=HostId(name),
        address="127.0.0.1:1",
        capacity=ROOMY,
        labels=(),
        images=(HostImage("base:latest", BASE),),
        accelerator=Accelerator.KVM,
        accelerator_reason="",
        network_modes=(NetworkMode.NONE, NetworkMode.CLOSED),
        version="0.1.0",
        registered_at_ms=NOW_MS,
    )
    return replace(made, **changes)


def assignment(wish: SandboxRecord, carrier: HostRecord, **changes: Any) -> Assignment:
    """The order that puts `wish` on `carrier`."""
    made = Assignment(
        sandbox_id=wish.sandbox_id,
        tenant=wish.tenant,
        host_id=carrier.host_id,
        spec=wish.spec,
        image_digest=BASE,
        overhead_mib=overhead_mib(wish.spec.resources, carrier.accelerator),
        goal=wish.goal,
        generation=wish.generation,
        created_at_ms=wish.created_at_ms,
        assigned_at_ms=NOW_MS,
        run=wish.run,
        accounts=("",),
    )
    return replace(made, **changes)


def status(order: Assignment, phase: Phase = Phase.RUNNING, **changes: Any) -> SandboxStatus:
    """What the order's host publishes."""
    made = SandboxStatus(order.sandbox_id, order.host_id, order.generation, phase, run=order.run)
    return replace(made, **changes)


def snapshot(
    *,
    records: Iterable[SandboxRecord] = (),
    assignments: Iterable[Assignment] = (),
    statuses: Iterable[SandboxStatus] = (),
    hosts: Iterable[HostRecord] = (),
    **changes: Any,
) -> Snapshot:
    """A snapshot with every host alive, unless `alive` says otherwise."""
    hosts = tuple(hosts)
    made = Snapshot(
        records={one.sandbox_id: one for one in records},
        assignments={one.sandbox_id: one for one in assignments},
        statuses={(one.host_id, one.sandbox_id): one for one in statuses},
        hosts={one.host_id: one for one in hosts},
        alive=frozenset(one.host_id for one in hosts),
    )
    return replace(made, **changes)


def host_puts(carrier: HostRecord) -> list[Put]:
    """The keys of a host that is registered and alive."""
    alive = HostAlive(carrier.host_id, "boot", NOW_MS)
    return [Put(host_key(carrier.host_id), encode(carrier)), Put(alive_key(carrier.host_id), encode(alive))]


def record_puts(wish: SandboxRecord) -> list[Put]:
    """The keys of a wish as the API writes them."""
    return [
        Put(record_key(wish.tenant, wish.sandbox_id), encode(wish)),
        Put(id_key(wish.sandbox_id), wish.tenant.encode()),
        Put(name_key(wish.tenant, wish.spec.name), wish.sandbox_id.encode()),
    ]


def status_put(published: SandboxStatus) -> Put:
    return Put(status_key(published.host_id, published.sandbox_id), encode(published))


def source_put(holder: HostRecord, tenant: Tenant = DEMO) -> Put:
    return Put(source_key(tenant, SOURCE.removeprefix("sha256:"), holder.host_id), b"")


def planned(seen: Snapshot, now_ms: int = NOW_MS, seed: int = 0) -> Plan:
    """The plan for all that waits."""
    return plan(seen, cluster_of(seen, now_ms), seen.pending(), now_ms=now_ms, seed=seed)
