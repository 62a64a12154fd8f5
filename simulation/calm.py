"""What must be true once all faults are over and the fleet is quiet: wishes carried out or rightly refused, nothing left over."""

from collections.abc import Mapping, Sequence

from fleet.model.host import Capacity, Reservation
from fleet.model.ids import SandboxId
from fleet.model.sandbox import ENDED_PHASES, Goal
from fleet.store import keyspace
from fleet.store.port import KeyValue
from hostd.reconcile.state import DomainState
from simulation.checker import Checker, ViolationError
from simulation.loop import VirtualLoop
from simulation.machines import HostProgram, Program


class Calm:
    """Looks at a quiet fleet; each look raises ViolationError."""

    def __init__(
        self, loop: VirtualLoop, checker: Checker, keys: Mapping[str, KeyValue], hosts: Sequence[HostProgram]
    ) -> None:
        self.loop = loop
        self.checker = checker
        self.keys = keys
        self.hosts = hosts

    def check_began(self) -> None:
        """A fleet in which nothing runs keeps every promise: some agents must have begun."""
        if not any(fact.starts for fact in self.checker.facts.values()):
            raise ViolationError("nothing_ran", "no agent of any sandbox has begun")

    def check_crashes(self, programs: Sequence[Program]) -> None:
        for program in programs:
            for error in program.crashes:
                raise ViolationError("crashed", f"{program.name} ended by itself: {_flat(error)}")
        for error in self.loop.errors:
            raise ViolationError("crashed", f"a callback raised {error!r}")

    def check_quiet(self) -> None:
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
        self._check_runs()
        metered = sum(checker.metered.values())
        if checker.spent_wall_ms != metered:
            raise ViolationError("charge_wrong", f"{checker.spent_wall_ms} ms were charged, {metered} were measured")
        for key in self.keys:
            is_bound = key.startswith((keyspace.STATUSES, keyspace.ASSIGNMENTS))
            if is_bound and SandboxId(key.rsplit("/", 1)[1]) not in checker.records:
                raise ViolationError("orphan_key", f"{key} has no record")

    def _check_runs(self) -> None:
        """What is ordered to run and has not ended has its VM."""
        rooms = {host.host_id: host.room.hypervisor.domains for host in self.hosts}
        for (host_id, sandbox_id), order in sorted(self.checker.orders.items()):
            status = self.checker.statuses.get((host_id, sandbox_id))
            has_ended = status is not None and status.phase in ENDED_PHASES and status.run >= order.run
            if order.goal is Goal.RUN and not has_ended and sandbox_id not in rooms[host_id]:
                raise ViolationError("not_running", f"{sandbox_id} is ordered to run on {host_id}, and has no VM")

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
        budget = self.checker.budget_vcpus
        is_over = bool(budget) and self.checker.counted_vcpus() + resources.vcpus > budget
        # One that has used up its own limit waits for a larger one.
        may_ms = record.spec.limits.total.wall_ms
        used_ms = sum(used for (_, id_, _), used in self.checker.metered.items() if id_ == sandbox_id)
        is_over = is_over or 0 < may_ms <= used_ms
        # A group waits for all of its members: what of it is pending may miss one that was destroyed.
        if is_over or record.spec.placement.group or record.not_before_ms > self.loop.wall_s() * 1000:
            return
        for host in self.hosts:
            key = host.host_id
            if keyspace.cordon_key(key) in self.keys or keyspace.losses_key(key) in self.keys:
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

    def check_gone(self) -> None:
        """After everything was destroyed nothing is there but hosts, tombstones and history."""
        kept: tuple[str, ...] = (
            keyspace.HOSTS,
            keyspace.ALIVE,
            keyspace.LEADER,
            keyspace.RESERVATIONS,
            keyspace.TOMBSTONES,
        )
        kept = (
            *kept,
            keyspace.CORDONS,
            keyspace.LOSSES,
            keyspace.METERS,
            keyspace.CHARGED,
            keyspace.BALANCES,
            keyspace.BUDGETS,
        )
        for key in sorted(self.keys):
            if key.startswith(keyspace.ROOT) and not key.startswith(kept):
                raise ViolationError("left_over", f"{key} is there after everything was destroyed")
        for host in self.hosts:
            self._check_room(host)
            if self.checker.true_sum(host.host_id) != Capacity(0, 0, 0, 0):
                raise ViolationError("left_over", f"something is taken of {host.name}")


def _flat(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return repr(error)
