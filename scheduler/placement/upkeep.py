"""Keeps a cluster as a snapshot has it: only the hosts that something has changed are taken up again. PURE.

What a cluster is follows from the snapshot and the time alone, so one made anew from a listing decides as the kept one did.
"""

from collections.abc import Iterable

from fleet.model.assignment import ANY_NODE, Assignment
from fleet.model.host import NumaNode
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Resources, SandboxSpec
from scheduler.placement.cluster import Cluster
from scheduler.placement.demand import Shape, demand_of, shape_of
from scheduler.placement.hosts import HostView
from scheduler.placement.snapshot import Snapshot, set_aside
from scheduler.placement.weights import Weights

Source = tuple[Tenant, Digest]
Popularity = tuple[tuple[Shape, int], ...]
# Shapes that are told apart; the rarer ones are a small part of all.
SHAPES_MAX = 64


class ClusterUpkeep:
    """A cluster, and what of it is not as the snapshot has it."""

    def __init__(self, weights: Weights | None = None) -> None:
        self.cluster = Cluster(weights)
        self._popularity: Popularity = ()
        self._backing_off: frozenset[HostId] = frozenset()
        self._stale_hosts: set[HostId] = set()
        self._stale_sources: set[Source] = set()

    def stir(self, host_id: HostId) -> None:
        """Something about a host has changed."""
        self._stale_hosts.add(host_id)

    def stir_source(self, source: Source) -> None:
        """Other hosts hold a source than before."""
        self._stale_sources.add(source)

    def refresh(self, snapshot: Snapshot, now_ms: int) -> Cluster:
        """The cluster as `snapshot` has it at that time; marks set before are void."""
        backing_off = frozenset(host_id for host_id in snapshot.losses if snapshot.is_backing_off(host_id, now_ms))
        self._stale_hosts |= backing_off ^ self._backing_off
        self._backing_off = backing_off
        for host_id in sorted(self._stale_hosts):
            if host_id in snapshot.hosts:
                self.cluster.upsert_host(view_of(snapshot, host_id, now_ms))
            else:
                self.cluster.remove_host(host_id)
        self._stale_hosts.clear()
        for source in self._stale_sources:
            self.cluster.set_holders(*source, snapshot.sources.get(source, frozenset()))
        self._stale_sources.clear()
        popularity = popularity_of(snapshot)
        if popularity != self._popularity:
            self._popularity = popularity
            self.cluster.set_popularity(popularity)
        return self.cluster


def cluster_of(snapshot: Snapshot, now_ms: int, weights: Weights | None = None) -> Cluster:
    """A cluster made anew."""
    upkeep = ClusterUpkeep(weights)
    for host_id in snapshot.hosts:
        upkeep.stir(host_id)
    for source in snapshot.sources:
        upkeep.stir_source(source)
    return upkeep.refresh(snapshot, now_ms)


def view_of(snapshot: Snapshot, host_id: HostId, now_ms: int) -> HostView:
    """A registered host as the engine takes it up."""
    sums, losses = snapshot.sums, snapshot.losses.get(host_id)
    record = snapshot.hosts[host_id]
    return HostView(
        record=record,
        is_alive=host_id in snapshot.alive,
        is_readable=host_id not in snapshot.opaque_hosts,
        is_cordoned=host_id in snapshot.cordons,
        is_backing_off=snapshot.is_backing_off(host_id, now_ms),
        reserved=sums.reserved_by_host.get(host_id),
        tenant_counts=dict(sums.tenants_on.get(host_id, {})),
        losses=losses,
        numa_used=_numa_used(snapshot, host_id) if len(record.numa_nodes) > 1 else (),
    )


def popularity_of(snapshot: Snapshot) -> Popularity:
    """What the sandboxes to come look like, by those there are; nothing where no host has a device, for which alone it matters.

    Counts are rounded down to powers of two: a cluster changes with them when there are twice as many, and not each time.
    """
    sums = snapshot.sums
    if not sums.device_hosts:
        return ()
    counts: dict[Shape, int] = {}
    for resources, count in sums.resources_of.items():
        shape = _shape(resources)
        counts[shape] = counts.get(shape, 0) + count
    rounded = ((shape, 1 << count.bit_length() - 1) for shape, count in counts.items())
    return tuple(sorted(rounded, key=lambda one: (-one[1], repr(one[0])))[:SHAPES_MAX])


def _shape(resources: Resources) -> Shape:
    return shape_of(demand_of(SandboxSpec("", resources=resources)))


def _numa_used(snapshot: Snapshot, host_id: HostId) -> tuple[NumaNode, ...]:
    used: dict[int, tuple[int, int]] = {}
    for assignment in _orders(snapshot, host_id, snapshot.sums.sandboxes_on.get(host_id, ())):
        held = set_aside(assignment, snapshot.status_of(assignment))
        if assignment.numa_node != ANY_NODE and held.vcpus:
            vcpus, memory_mib = used.get(assignment.numa_node, (0, 0))
            used[assignment.numa_node] = (vcpus + held.vcpus, memory_mib + held.memory_mib)
    return tuple(NumaNode(node, *amounts) for node, amounts in sorted(used.items()))


def _orders(snapshot: Snapshot, host_id: HostId, sandbox_ids: Iterable[SandboxId]) -> Iterable[Assignment]:
    for sandbox_id in sandbox_ids:
        best = snapshot.assignments.get(sandbox_id)
        found = best if best is not None and best.host_id == host_id else snapshot.remnants.get((host_id, sandbox_id))
        if found is not None:
            yield found
