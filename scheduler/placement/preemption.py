"""Which sandboxes end so that one of a higher priority has room. PURE.

Only strictly lower priorities end, on one host, and none in vain: without any one of them the room would not do. Of all hosts it is
that where it costs least: by the highest priority among those that end, then how many of them cannot go on elsewhere, how many they
are, and the vCPU-time since they were placed. What is on its way out of a host counts before anything else has to end. The room is
held for whom it is made, plan after plan, until it is free: its refusal names the host, where later plans look first. What was
preempted itself preempts nobody: no chain of it comes about.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from fleet.model.assignment import Assignment, GpuShare, RefusalReason
from fleet.model.ids import NO_HOST, HostId, SandboxId
from fleet.model.sandbox import Goal, Reason
from scheduler.placement.cluster import Choice, Cluster
from scheduler.placement.evictions import PREEMPTED, Ending, Halt, halt
from scheduler.placement.hosts import Share
from scheduler.placement.snapshot import Snapshot
from scheduler.placement.wishes import Ask, held_by

PREEMPTING = "preempting"
# Room is made anew for so many in one plan, each on a host of its own; the next plan makes more.
ROOMS_MAX = 8
# Hosts looked at for one, some 0.2 ms each; in large fleets another part of them in each plan.
HOSTS_MAX = 32

Cost = tuple[int, int, int, int, str]


@dataclass(frozen=True, slots=True)
class _Victim:
    """One that may end: what it frees on its host, and how it would leave."""

    move: Halt | Ending
    priority: int
    work: int
    frees: Share

    @property
    def cost(self) -> tuple[int, bool, int, str]:
        """Lower ends first."""
        return self.priority, isinstance(self.move, Ending), self.work, self.move.assignment.sandbox_id


@dataclass(frozen=True, slots=True)
class _Room:
    """Where it would be, who ends for it, and all that becomes free there until then; `leaving` go anyway."""

    choice: Choice
    victims: tuple[_Victim, ...]
    leaving: int
    frees: tuple[Share, ...]

    @property
    def cost(self) -> Cost:
        """Lower is chosen."""
        top = max((one.priority for one in self.victims), default=-(2**31))
        endings = sum(isinstance(one.move, Ending) for one in self.victims)
        return top, endings, len(self.victims), sum(one.work for one in self.victims), self.choice.host_id


@dataclass(frozen=True, slots=True)
class Promise:
    """Where room is held, and what is told of it."""

    host_id: HostId
    reasons: tuple[RefusalReason, ...]


class Preemption:
    """Makes room while one plan is made; `moves` are how those leave that have to."""

    def __init__(self, snapshot: Snapshot, cluster: Cluster, asks: Sequence[Ask], when: tuple[int, int]) -> None:
        self.moves: list[Halt | Ending] = []
        self._snapshot = snapshot
        self._cluster = cluster
        self._now_ms, self._seed = when
        self._looked = 0
        self._taken: set[HostId] = set()
        self._known: dict[HostId, tuple[Sequence[Share], Sequence[_Victim]]] = {}
        self._lowest = min(snapshot.sums.priorities, default=0)
        known = {ask.record.sandbox_id: snapshot.refusals.get(ask.record.sandbox_id) for ask in asks}
        self._promised = {
            one: refusal.host_id for one, refusal in known.items() if refusal is not None and refusal.host_id
        }

    def make_room(self, ask: Ask, held: Share | None) -> Promise | None:
        """Holds room for one that fits nowhere, and says so; None where none can be made.

        `held` is what it has on its own host, where it is bound to that.
        """
        if ask.record.spec.placement.priority <= self._lowest or _was_preempted(ask):
            return None
        room = self._find(ask, held)
        if room is None:
            return None
        host_id = room.choice.host_id
        self._taken.add(host_id)
        own = () if held is None else (held,)
        self._cluster.take(host_id, _beyond(room.choice.share, (*room.frees, *own)))
        self.moves += [self._move(ask, one) for one in room.victims]
        return Promise(host_id, (RefusalReason(PREEMPTING, 1, _told(room)),))

    def _find(self, ask: Ask, held: Share | None) -> _Room | None:
        """Where room was promised, if nobody else has to end there for it; else the cheapest, rather where nothing is promised."""
        own = self._promised.get(ask.record.sandbox_id, NO_HOST)
        if own not in (NO_HOST, *self._taken) and self._cluster.crowded(ask.demand, replace(ask.wish, pinned_host=own)):
            room = self._look(ask, own, held)
            if room is not None and not room.victims:
                return room
        if self._looked == ROOMS_MAX:
            return None
        self._looked += 1
        hosts = [one for one in self._cluster.crowded(ask.demand, ask.wish) if one not in self._taken]
        others = {host_id for one, host_id in self._promised.items() if one != ask.record.sandbox_id}
        free = [one for one in hosts if one not in others]
        found = (self._cheapest(ask, some, held) for some in (free, [one for one in hosts if one in others]))
        return next((room for room in found if room is not None), None)

    def _cheapest(self, ask: Ask, hosts: Sequence[HostId], held: Share | None) -> _Room | None:
        start = self._seed % len(hosts) if len(hosts) > HOSTS_MAX else 0
        looked = (self._look(ask, host_id, held) for host_id in [*hosts[start:], *hosts[:start]][:HOSTS_MAX])
        return min((room for room in looked if room is not None), key=lambda one: one.cost, default=None)

    def _look(self, ask: Ask, host_id: HostId, held: Share | None) -> _Room | None:
        """Who ends on one host: the cheapest first until it fits; then, from the dearest on, each stays who is not needed."""
        leaving, all_victims = self._on(host_id)
        priority = ask.record.spec.placement.priority
        victims = [one for one in all_victims if one.priority < priority]
        cluster, wish = self._cluster, replace(ask.wish, pinned_host=host_id)
        mark = cluster.mark()
        try:
            for share in (*leaving, *(() if held is None else (held,))):
                cluster.give_back(host_id, share)
            needed: list[_Victim] = []
            choice = cluster.choose(ask.demand, wish)
            while choice is None and len(needed) < len(victims):
                needed.append(victims[len(needed)])
                cluster.give_back(host_id, needed[-1].frees)
                choice = cluster.choose(ask.demand, wish)
            if choice is None:
                return None
            # The last one is needed: without it it did not fit.
            for one in needed[-2::-1]:
                cluster.take(host_id, one.frees)
                found = cluster.choose(ask.demand, wish)
                if found is None:
                    cluster.give_back(host_id, one.frees)
                else:
                    choice = found
                    needed.remove(one)
        finally:
            cluster.rollback(mark)
        return _Room(choice, tuple(needed), len(leaving), (*leaving, *(one.frees for one in needed)))

    def _on(self, host_id: HostId) -> tuple[Sequence[Share], Sequence[_Victim]]:
        """What leaves a host anyway, and who may end there, the cheapest first."""
        known = self._known.get(host_id)
        if known is None:
            orders = list(_orders(self._snapshot, host_id))
            leaving = [share for share in (_leaves(self._snapshot, one) for one in orders) if share is not None]
            known = self._known[host_id] = leaving, sorted(self._victims(orders), key=lambda one: one.cost)
        return known

    def _victims(self, orders: Sequence[Assignment]) -> Iterator[_Victim]:
        for order in orders:
            move = halt(self._snapshot, order.sandbox_id, Reason(PREEMPTED, ""))
            if move is not None:
                share = held_by(self._snapshot, order)
                frees = share if isinstance(move, Halt) else _without_disk(share)
                work = order.spec.resources.vcpus * max(0, self._now_ms - order.assigned_at_ms)
                yield _Victim(move, order.spec.placement.priority, work, frees)

    def _move(self, ask: Ask, victim: _Victim) -> Halt | Ending:
        """How it leaves, with the reason that its owner reads."""
        record, order = ask.record, victim.move.assignment
        # Names are their tenants' own: no other is told for whom it ends.
        who = f"sandbox {record.spec.name}" if order.tenant == record.tenant else "a sandbox"
        text = (
            f"{who} of priority {record.spec.placement.priority} needs its room, and it has priority {victim.priority}"
        )
        move = halt(self._snapshot, order.sandbox_id, Reason(PREEMPTED, text))
        assert move is not None
        return move


def _orders(snapshot: Snapshot, host_id: HostId) -> Iterator[Assignment]:
    for sandbox_id in sorted(snapshot.sums.sandboxes_on.get(host_id, ())):
        order = snapshot.assignments.get(sandbox_id)
        if order is None or order.host_id != host_id:
            order = snapshot.remnants.get((host_id, sandbox_id))
        if order is not None:
            yield order


def _leaves(snapshot: Snapshot, order: Assignment) -> Share | None:
    """What one frees that is on its way out already; None for one that stays."""
    share, record = held_by(snapshot, order), snapshot.records.get(order.sandbox_id)
    is_current = record is not None and snapshot.assignment_of(record) is order
    goal = record.goal if record is not None else Goal.REMOVE
    if order.goal is Goal.REMOVE or not is_current or goal is Goal.REMOVE:
        return share if share != Share(tenant=order.tenant) else None
    is_halted = order.goal is Goal.STOP and goal is Goal.RUN and not _is_resuming(snapshot, order.sandbox_id)
    if is_halted and order.reason is not None:
        return share
    if (order.goal is Goal.STOP or goal is Goal.STOP) and share.vcpu_milli:
        return _without_disk(share)
    return None


def _is_resuming(snapshot: Snapshot, sandbox_id: SandboxId) -> bool:
    record = snapshot.records.get(sandbox_id)
    return record is not None and snapshot.is_resuming(record)


def _without_disk(share: Share) -> Share:
    """What a stopped sandbox frees: its disk and its place stay until it is destroyed."""
    return replace(share, disk_mib=0, sandboxes=0)


def _was_preempted(ask: Ask) -> bool:
    reason = ask.record.reason
    return reason is not None and reason.code == PREEMPTED


def _beyond(share: Share, frees: Iterable[Share]) -> Share:
    """What of `share` has to be there now, because `frees` will not bring it."""
    frees = tuple(frees)
    coming: dict[str, int] = {}
    for one in frees:
        for gpu in one.gpus:
            coming[gpu.device_id] = coming.get(gpu.device_id, 0) + gpu.milli
    gpus = (GpuShare(one.device_id, one.milli - coming.get(one.device_id, 0)) for one in share.gpus)
    return Share(
        max(0, share.vcpu_milli - sum(one.vcpu_milli for one in frees)),
        max(0, share.memory_mib - sum(one.memory_mib for one in frees)),
        max(0, share.disk_mib - sum(one.disk_mib for one in frees)),
        max(0, share.sandboxes - sum(one.sandboxes for one in frees)),
        tuple(one for one in gpus if one.milli > 0),
    )


def _told(room: _Room) -> str:
    host_id, ends = room.choice.host_id, len(room.victims)
    if not ends:
        return f"waits for {room.leaving} to leave host {host_id}, where its room is held"
    also = f", and {room.leaving} leave it anyway" if room.leaving else ""
    return f"{ends} of lower priority {'ends' if ends == 1 else 'end'} on host {host_id} to make room for it{also}"
