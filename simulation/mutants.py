"""Seeded bugs: what the checker must see. Each is put into the real parts from outside, in the process of one run.

A checker that finds nothing proves nothing. These are mistakes that one could make: a condition left out, a wait skipped, a word
said too early. tests/simulation and docs/simulation.md tell after how many seeds each is found.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hostd.daemon
import hostd.fencing
import hostd.reconcile.diff
import scheduler.api.creations
import scheduler.budget.journal
import scheduler.commit
import scheduler.placement.evictions
import scheduler.placement.plan
from fleet.model.assignment import Assignment
from fleet.model.sandbox import Goal
from fleet.store.keyspace import LEADER, TOMBSTONES
from fleet.store.mirror import Mirror
from fleet.store.port import Put, Unmoved
from hostd.drivers.simulated import SimulatedGuard
from hostd.orders import Orders
from hostd.publish import Publisher
from hostd.reconcile.diff import Step
from hostd.reconcile.fence import Stance
from hostd.reconcile.loop import Reconciler
from scheduler.commit import Committer
from scheduler.placement.cluster import Cluster
from scheduler.placement.purse import Purse
from scheduler.placement.snapshot import Sums

# From what an attribute is to what stands in its place.
Spoil = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A seeded bug: what is spoiled where."""

    name: str
    says: str
    swaps: tuple[tuple[Any, str, Spoil], ...]


def apply_mutant(name: str) -> None:
    """Puts the bug into this process, for good; raises KeyError for an unknown name."""
    for owner, attribute, spoil in MUTANTS[name].swaps:
        setattr(owner, attribute, spoil(getattr(owner, attribute)))


def _drop_leader(whole: Any) -> Any:
    async def transact(self: Committer, conditions: list[Unmoved], writes: list[Any]) -> Any:
        return await whole(self, [one for one in conditions if one.key != LEADER], writes)

    return transact


def _release_twice(whole: Any) -> Any:
    def shift(self: Sums, tenant: Any, before: Any, after: Any) -> None:
        whole(self, tenant, before, after)
        if after.vcpus < before.vcpus and after.disk_mib == before.disk_mib:
            whole(self, tenant, before, after)

    return shift


def _keep_order(whole: Any) -> Any:
    def evict(record: Any, assignment: Assignment, reason: Any, now_ms: int) -> Any:
        made = whole(record, assignment, reason, now_ms)
        return replace(made, assignment=replace(made.assignment, goal=Goal.RUN))

    return evict


def _never_list_again(whole: Any) -> Any:
    async def relist(self: Mirror) -> float:
        if not self.revision:
            return float(await whole(self))
        self.revision = (await self._store.list_prefix(self._prefix)).revision
        self.is_fresh = True
        return self._relist_s

    return relist


def _without_conditions(whole: Any) -> Any:
    def creation_of(record: Any, actor: str, place: int = 0) -> Any:
        return replace(whole(record, actor, place), unmoved=())

    return creation_of


def _forget_order(whole: Any) -> Any:
    def put_order(self: Orders, order: Assignment) -> None:
        whole(self, order)
        (self._orders_dir / order.sandbox_id).unlink(missing_ok=True)

    return put_order


def _forget_configured(whole: Any) -> Any:
    def put_progress(self: Orders, progress: Any) -> None:
        path = self._sandboxes_dir / progress.sandbox_id / "progress"
        before = path.read_bytes() if path.exists() else None
        whole(self, progress)
        if progress.is_configured and before is not None:
            path.write_bytes(before)

    return put_progress


def _leave_scratch(whole: Any) -> Any:
    def take_down(*given: Any, **named: Any) -> list[Step]:
        return [step for step in whole(*given, **named) if step is not Step.REMOVE_SCRATCH]

    return take_down


def _tell_unfenced(whole: Any) -> Any:
    async def publish(self: Publisher, held: Unmoved) -> Any:
        return await whole(self, _Anyway(held.key, held.mod_revision))

    return publish


class _Anyway(Unmoved):
    """A condition that always holds: the store is asked about a key that nobody writes."""

    def __init__(self, key: str, mod_revision: int) -> None:  # noqa: ARG002
        super().__init__("/nobody", 0)


def _without_tombstone(whole: Any) -> Any:
    def left_behind(*given: Any) -> list[Any]:
        return [one for one in whole(*given) if not (isinstance(one, Put) and one.key.startswith(TOMBSTONES))]

    return left_behind


def _charge_again(whole: Any) -> Any:
    def due_of(used: Any, charged: Any, prices: Any) -> Any:
        found = whole(used, charged, prices)
        return replace(found, wall_ms=2 * found.wall_ms)

    return due_of


def _seat_some(whole: Any) -> Any:
    def seat(cluster: Cluster, members: Any) -> Any:
        return whole(cluster, members[:1])

    return seat


def _always(answer: Any) -> Spoil:
    return lambda _whole: lambda *_given, **_named: answer


def _value(value: Any) -> Spoil:
    return lambda _whole: value


_evictions = scheduler.placement.evictions

_ALL = (
    Mutant("leader_fence_dropped", "commits do not ask who leads", ((Committer, "_transact", _drop_leader),)),
    Mutant("released_twice", "a stop gives vCPUs and memory back twice", ((Sums, "shift", _release_twice),)),
    Mutant(
        "host_never_fences",
        "a host without its lease runs on, and its guard looks away",
        ((hostd.fencing, "find_stance", _always(Stance.RUN)), (SimulatedGuard, "look", _always(False))),
    ),
    Mutant(
        "fence_not_waited", "a lost host's sandboxes are placed at once", ((_evictions, "FENCE_WAIT_S", _value(0.0)),)
    ),
    Mutant("old_order_kept", "an evicted sandbox keeps its old order", ((_evictions, "_evict", _keep_order),)),
    Mutant(
        "never_listed_again", "a mirror lists once, then believes its watch", ((Mirror, "_relist", _never_list_again),)
    ),
    Mutant(
        "creation_unconditional",
        "a creation is written whatever is there",
        (
            (scheduler.commit, "creation_of", _without_conditions),
            (scheduler.api.creations, "creation_of", _without_conditions),
        ),
    ),
    Mutant(
        "released_early", "a host says released before its VM is gone", ((Reconciler, "is_released", _always(True)),)
    ),
    Mutant("order_not_durable", "an order is acted on and not on the disk", ((Orders, "put_order", _forget_order),)),
    Mutant(
        "configured_forgotten",
        "a restart forgets that agents have begun",
        ((Orders, "put_progress", _forget_configured),),
    ),
    Mutant("scratch_left", "a scratch disk stays", ((hostd.reconcile.diff, "_take_down", _leave_scratch),)),
    Mutant("plan_forgets", "a plan does not count what it has just placed", ((Cluster, "take", _always(None)),)),
    Mutant(
        "begins_untold", "agents begin before the store knows", ((hostd.daemon._Daemon, "_may_begin", _always(True)),)
    ),
    Mutant(
        "tombstone_missing",
        "a destroyed id may be created again",
        ((scheduler.commit, "left_behind", _without_tombstone),),
    ),
    Mutant("budget_ignored", "a plan does not ask what an account may use", ((Purse, "refuse", _always(None)),)),
    Mutant(
        "charged_twice",
        "what a host has measured is charged twice",
        ((scheduler.budget.journal, "due_of", _charge_again),),
    ),
    Mutant("group_by_half", "of a group one member is placed", ((scheduler.placement.plan, "seat", _seat_some),)),
    Mutant("status_unfenced", "a host publishes without its lease", ((Publisher, "_publish", _tell_unfenced),)),
)

MUTANTS = {mutant.name: mutant for mutant in _ALL}
