"""What must hold after every step, whatever has failed. It reads the store's keys and the machines itself: no sum of the product's
own code is believed.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fleet.codec import decode
from fleet.errors import InvalidSpecError
from fleet.model.assignment import Assignment
from fleet.model.budget import Balance, Meter
from fleet.model.host import Capacity, Reservation
from fleet.model.ids import HostId, SandboxId, Tenant
from fleet.model.sandbox import ENDED_PHASES, Goal, Phase, Restart, SandboxRecord, SandboxStatus, StageName
from fleet.store import keyspace
from fleet.store.port import Delete, KeyValue, Put, Write
from hostd.drivers.simulated import SimulatedHypervisor
from hostd.reconcile.state import DomainState

# The last things that happened, shown with a violation.
HISTORY_SHOWN = 40


class ViolationError(Exception):
    """An invariant that does not hold; `invariant` is its short name."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant
        self.message = message

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return ViolationError, (self.invariant, self.message)


@dataclass(slots=True)
class Fact:
    """What clients and agents have seen of one sandbox."""

    is_acknowledged: bool = False
    is_destroy_asked: bool = False
    was_placed: bool = False
    starts: int = 0
    # The (placement, run) pairs that were ordered: each may begin its agents once.
    ordered: set[tuple[int, int]] = field(default_factory=set)


class Checker:
    """Looks at every write and every domain as it changes; `check` raises what was found."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.facts: dict[SandboxId, Fact] = defaultdict(Fact)
        self.records: dict[SandboxId, SandboxRecord] = {}
        self.orders: dict[tuple[HostId, SandboxId], Assignment] = {}
        self.statuses: dict[tuple[HostId, SandboxId], SandboxStatus] = {}
        self.reservations: dict[HostId, Reservation] = {}
        self.capacities: dict[HostId, Capacity] = {}
        self.running: dict[SandboxId, set[HostId]] = defaultdict(set)
        self.lost_state: set[str] = set()
        self._gone: set[SandboxId] = set()
        self._names: dict[tuple[Tenant, str], SandboxId] = {}
        # The tenant's limit of vCPUs at once, 0 for none; what it has spent, and the last word of each host on each placement.
        self.budget_vcpus = 0
        self.spent_wall_ms = 0
        self.metered: dict[tuple[str, SandboxId, int], int] = {}
        self.found: ViolationError | None = None
        self.has_order_on_disk: Mapping[HostId, Callable[[SandboxId], bool]] = {}

    def check(self) -> None:
        """Raises the first violation that was found."""
        if self.found is not None:
            raise self.found

    def violate(self, invariant: str, message: str) -> None:
        """Notes a violation; the first counts."""
        if self.found is None:
            self.found = ViolationError(invariant, message)

    def committed(self, who: str, writes: Sequence[Write], leader: KeyValue | None, *, is_alive: bool) -> None:
        """A transaction of `who` took effect while `leader` was the leader's key; a host `is_alive` by its proof of life."""
        keys = [write.key for write in writes]
        self._tell(f"{who} wrote {' '.join(key.removeprefix(keyspace.ROOT) for key in keys[:6])}")
        decided = [key for key in keys if key.startswith((keyspace.ASSIGNMENTS, keyspace.RESERVATIONS))]
        if decided and (leader is None or leader.value.decode() != who):
            name = leader.value.decode() if leader is not None else "nobody"
            self.violate("zombie", f"{who} wrote {decided[0]} while {name} led")
        if not is_alive and any(key.startswith(keyspace.STATUSES) for key in keys):
            self.violate("stale_status", f"{who} published without its lease")
        for write in writes:
            self._take(who, write)
        hosts = {key.split("/")[4] for key in keys if key.startswith((keyspace.ASSIGNMENTS, keyspace.STATUSES))}
        for host_id in sorted(hosts):
            self._check_room(HostId(host_id))
        if hosts:
            self._check_budget(who)
        self._check_groups(who, writes)

    def _take(self, who: str, write: Write) -> None:
        prefix = next((one for one in _TAKERS if write.key.startswith(one)), None)
        if prefix is not None:
            try:
                _TAKERS[prefix](self, who, write)
            except InvalidSpecError:
                self._tell(f"{write.key} is opaque")

    def counted_vcpus(self) -> int:
        """What counts in the tenant's budget; what a lost host has left counts nowhere."""
        total = 0
        for (host_id, sandbox_id), order in self.orders.items():
            is_left = order.goal is not Goal.RUN and order.reason is not None and order.reason.code == "host_lost"
            if not is_left:
                total += _share_of(order, self.statuses.get((host_id, sandbox_id)))[0]
        return total

    def _check_budget(self, who: str) -> None:
        if self.budget_vcpus and self.counted_vcpus() > self.budget_vcpus:
            self.violate("over_budget", f"{who}: {self.counted_vcpus()} vCPUs of {self.budget_vcpus} are in use")

    def _check_groups(self, who: str, writes: Sequence[Write]) -> None:
        """The first orders of a group's members are one transaction's."""
        placed: Counter[tuple[str, int]] = Counter()
        for write in writes:
            if isinstance(write, Put) and write.key.startswith(keyspace.ASSIGNMENTS):
                order = decode(Assignment, write.value)
                wanted = order.spec.placement
                fact = self.facts[order.sandbox_id]
                if wanted.group and not fact.was_placed and order.goal is Goal.RUN:
                    placed[wanted.group, wanted.group_size] += 1
                fact.was_placed = True
        for (group, size), count in placed.items():
            if count != size:
                self.violate("half_a_group", f"{who} placed {count} of {group}'s {size}")

    def _take_balance(self, _who: str, write: Write) -> None:
        if isinstance(write, Put) and write.key.endswith("/"):
            self.spent_wall_ms = decode(Balance, write.value).spent.wall_ms

    def _take_meter(self, _who: str, write: Write) -> None:
        if isinstance(write, Put):
            meter = decode(Meter, write.value)
            for entry in meter.entries:
                key = str(meter.host_id), entry.sandbox_id, entry.placement
                if entry.used.wall_ms < self.metered.get(key, 0):
                    self.violate("meter_back", f"{meter.host_id} takes back what {entry.sandbox_id} has used")
                self.metered[key] = entry.used.wall_ms

    def _take_record(self, who: str, write: Write) -> None:
        sandbox_id = SandboxId(write.key.rsplit("/", 1)[1])
        fact = self.facts[sandbox_id]
        if isinstance(write, Delete):
            gone = self.records.pop(sandbox_id, None)
            if gone is not None:
                self._gone.add(sandbox_id)
                self._names.pop((gone.tenant, gone.spec.name), None)
            if not fact.is_destroy_asked:
                self.violate("lost", f"{who} removed the record of {sandbox_id}, which nobody asked to destroy")
            return
        record = decode(SandboxRecord, write.value)
        before = self.records.get(sandbox_id)
        if before is not None and (record.generation < before.generation or record.placement < before.placement):
            self.violate("record_back", f"{who} took the record of {sandbox_id} back to {record.generation}")
        holder = self._names.setdefault((record.tenant, record.spec.name), sandbox_id)
        if holder != sandbox_id:
            self.violate("name_twice", f"{who}: {record.spec.name} is {holder} and {sandbox_id}")
        if sandbox_id in self._gone:
            self.violate("resurrected", f"{who} created {sandbox_id}, which was destroyed")
        self.records[sandbox_id] = record

    def _take_order(self, who: str, write: Write) -> None:
        host_id, sandbox_id = write.key.split("/")[4:6]
        key = HostId(host_id), SandboxId(sandbox_id)
        if isinstance(write, Delete):
            self.orders.pop(key, None)
            return
        order = decode(Assignment, write.value)
        self.orders[key] = order
        if order.goal is Goal.RUN:
            self.facts[key[1]].ordered.add((order.placement, order.run))
            others = [(host, one) for (host, id_), one in self.orders.items() if id_ == key[1] and host != key[0]]
            for host, one in others:
                if one.goal is Goal.RUN:
                    self.violate("two_orders", f"{who}: {sandbox_id} is ordered to run on {host} and on {host_id}")

    def _take_status(self, who: str, write: Write) -> None:
        host_id, sandbox_id = write.key.split("/")[4:6]
        key = HostId(host_id), SandboxId(sandbox_id)
        if who != host_id:
            self.violate("foreign_status", f"{who} wrote {write.key}")
        if isinstance(write, Delete):
            self.statuses.pop(key, None)
            return
        status = decode(SandboxStatus, write.value)
        before = self.statuses.get(key)
        if before is not None and _is_same_run(before, status) and before.phase in ENDED_PHASES:
            # A host that has lost its state says so of whatever it had: what was stopped there cannot be started again.
            is_lost = host_id in self.lost_state and status.phase is Phase.FAILED
            if not is_lost and status.phase not in (before.phase, Phase.REMOVING, Phase.REMOVED):
                self.violate("ends_twice", f"{sandbox_id} on {host_id}: {before.phase}, then {status.phase}")
        self.statuses[key] = status
        self._tell(f"{host_id} says {sandbox_id} {status.phase} run {status.run} released {status.released}")
        if status.released and status.phase is not Phase.REMOVED and host_id in self.running[key[1]]:
            self.violate("released_running", f"{host_id} says that {sandbox_id} is released, and its domain runs")

    def _take_reservation(self, _who: str, write: Write) -> None:
        host_id = HostId(write.key.rsplit("/", 1)[1])
        if isinstance(write, Put):
            self.reservations[host_id] = decode(Reservation, write.value)
        else:
            self.reservations.pop(host_id, None)

    def true_sum(self, host_id: HostId) -> Capacity:
        """What the host's orders take, by what it says of them."""
        taken = [0, 0, 0, 0]
        for (host, sandbox_id), order in self.orders.items():
            if host != host_id:
                continue
            share = _share_of(order, self.statuses.get((host, sandbox_id)))
            taken = [one + other for one, other in zip(taken, share, strict=True)]
        return Capacity(*taken)

    def _check_room(self, host_id: HostId) -> None:
        capacity, taken = self.capacities.get(host_id), self.true_sum(host_id)
        if capacity is None:
            return
        said = self.reservations.get(host_id, Reservation(host_id))
        for name in ("vcpus", "memory_mib", "disk_mib", "sandboxes"):
            if getattr(taken, name) > getattr(capacity, name):
                self.violate("overcommitted", f"{host_id} has {getattr(capacity, name)} {name}, {taken} is ordered")
            if getattr(said, name) < getattr(taken, name):
                self.violate("under_reserved", f"{host_id}: {said} is reserved, {taken} is ordered")

    def domain_changed(self, host_id: HostId, hypervisor: SimulatedHypervisor, sandbox_id: SandboxId) -> None:
        """A domain of a machine began, ended, paused or ran on."""
        domain = hypervisor.domains.get(sandbox_id)
        where = self.running[sandbox_id]
        if domain is None or domain.state is not DomainState.RUNNING:
            if host_id in where:
                self._tell(f"{host_id} {sandbox_id} {domain.state if domain else 'absent'}")
            where.discard(host_id)
            return
        if host_id not in where:
            self._tell(f"{host_id} {sandbox_id} runs")
        where.add(host_id)
        if len(where) > 1:
            self.violate("runs_twice", f"{sandbox_id} runs on {' and '.join(sorted(where))}")
        if not self.has_order_on_disk[host_id](sandbox_id):
            self.violate("not_durable", f"{sandbox_id} runs on {host_id}, where no order of it is on the disk")

    def agents_began(self, host_id: HostId, sandbox_id: SandboxId) -> None:
        """A guest was configured: its agents run."""
        fact = self.facts[sandbox_id]
        fact.starts += 1
        self._tell(f"{host_id} {sandbox_id} agents begin ({fact.starts})")
        record, runs = self.records.get(sandbox_id), {run for _, run in fact.ordered}
        restarts = record is None or any(agent.restart is not Restart.NO for agent in record.spec.agents)
        if not restarts and fact.starts > len(runs):
            self.violate(
                "begun_again", f"{sandbox_id} does not restart, and began {fact.starts} times in runs {sorted(runs)}"
            )
        if fact.starts > len(fact.ordered):
            self.violate("begun_twice", f"{sandbox_id} began {fact.starts} times, and was ordered {fact.ordered}")

    def acknowledged(self, sandbox_id: SandboxId) -> None:
        """A client was told that the sandbox is created."""
        fact = self.facts[sandbox_id]
        fact.is_acknowledged = True
        if sandbox_id not in self.records and not fact.is_destroy_asked:
            self.violate("lost", f"{sandbox_id} was acknowledged, and is not in the store")


def _share_of(order: Assignment, status: SandboxStatus | None) -> tuple[int, int, int, int]:
    """vCPUs, memory, disk and place that an order takes, by what its host says."""
    resources = order.spec.resources
    is_of_run = status is not None and status.run >= order.run and status.placement >= order.placement
    if status is None or not is_of_run or not status.released:
        return resources.vcpus, resources.memory_mib + order.overhead_mib, resources.disk_mib, 1
    if status.phase is Phase.STOPPED or _is_leaving_a_disk(status):
        return 0, 0, resources.disk_mib, 1
    return 0, 0, 0, 0


def _is_leaving_a_disk(status: SandboxStatus) -> bool:
    return status.phase is Phase.REMOVING and any(stage.name == StageName.DISK_KEPT for stage in status.stages)


def _is_same_run(one: SandboxStatus, other: SandboxStatus) -> bool:
    return (one.run, one.placement) == (other.run, other.placement)


_TAKERS: dict[str, Callable[[Checker, str, Write], None]] = {
    keyspace.RECORDS: Checker._take_record,
    keyspace.ASSIGNMENTS: Checker._take_order,
    keyspace.STATUSES: Checker._take_status,
    keyspace.RESERVATIONS: Checker._take_reservation,
    keyspace.BALANCES: Checker._take_balance,
    keyspace.METERS: Checker._take_meter,
}
