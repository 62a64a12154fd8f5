"""plan(snapshot, cluster, …) -> assignments and refusals. PURE: the same input gives the same plan, so it can be recomputed."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from fleet.model.assignment import Assignment, Refusal, RefusalReason
from fleet.model.cycle import Decision
from fleet.model.ids import NO_HOST, HostId, SandboxId
from fleet.model.sandbox import SandboxRecord
from scheduler.placement.cluster import Choice, Cluster
from scheduler.placement.evictions import PREEMPTED, Ending, Halt
from scheduler.placement.explanation import Explanation
from scheduler.placement.groups import Group, groups_of, incomplete, seat
from scheduler.placement.hosts import Share
from scheduler.placement.preemption import Preemption
from scheduler.placement.purse import Purse
from scheduler.placement.settings import Settings
from scheduler.placement.snapshot import Snapshot
from scheduler.placement.turns import Turns
from scheduler.placement.wishes import Ask, ask_of, demand_for, held_by, wish_of

# One plan's share of the event loop, and what commits within a blink: some seven transactions.
PLACEMENTS_MAX = 128
ORDINARY = Settings()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write: new assignments with the reservations they lead to, and why the other sandboxes have no host.

    `evictions` are how those of lower priority leave that make room for others. Each of `together` stands or falls as one.
    `decisions` are all of it as it is recorded. A plan that is not whole has left sandboxes for the next.
    """

    assignments: tuple[Assignment, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    evictions: tuple[Halt | Ending, ...] = ()
    together: tuple[tuple[SandboxId, ...], ...] = ()
    decisions: tuple[Decision, ...] = ()
    is_whole: bool = True


def plan(
    snapshot: Snapshot,
    cluster: Cluster,
    waiting: Sequence[SandboxRecord],
    *,
    now_ms: int,
    seed: int = 0,
    settings: Settings = ORDINARY,
) -> Plan:
    """Places those that are `waiting` in their turns; one that fits nowhere holds up nobody behind it.

    `cluster` is the snapshot's, and is left as it was. A sandbox that was stopped has one candidate for its next run: the host
    that has its disk. Refusals are told for the state after the plan: what is refused in it would be refused again at once. A
    tenant past its share of looks has the rest of its sandboxes looked at in other plans, in another order each time. Where room
    can be made by ending what has a lower priority, that is begun, and the room is held.
    """
    asks = [ask_of(snapshot, record) for record in waiting if record.not_before_ms <= now_ms]
    mark = cluster.mark()
    try:
        return _Round(snapshot, cluster, asks, (now_ms, seed, settings)).run()
    finally:
        cluster.rollback(mark)


class _Round:
    """One plan being made."""

    def __init__(
        self, snapshot: Snapshot, cluster: Cluster, asks: Sequence[Ask], terms: tuple[int, int, Settings]
    ) -> None:
        self._snapshot, self._cluster, self._asks = snapshot, cluster, asks
        self._now_ms, seed, settings = terms
        self._turns = Turns(snapshot, len(cluster), asks, settings, seed)
        self._groups = groups_of(snapshot, asks)
        self._purse = Purse(snapshot)
        self._preemption = Preemption(snapshot, cluster, asks, (self._now_ms, seed))
        self._placed: list[tuple[Assignment, int]] = []
        self._together: list[tuple[SandboxId, ...]] = []
        self._refused: list[Ask] = []
        # The reasons of those that do not wait for a host alone.
        self._told: dict[SandboxId, tuple[RefusalReason, ...]] = {}
        self._rooms: dict[SandboxId, HostId] = {}
        self._stuck: list[Group] = []
        self._seen: set[SandboxId] = set()
        self._hopeless: set[Hashable] = set()

    def run(self) -> Plan:
        """The plan; leaves the cluster as full as it makes it."""
        while len(self._placed) < PLACEMENTS_MAX and (ask := self._turns.next()) is not None:
            group = self._groups.get(ask.record.sandbox_id)
            if ask.record.sandbox_id in self._seen:
                continue
            if group is None:
                self._place(ask)
            else:
                self._place_group(group)
        refusals = self._refuse_all()
        decisions = (
            *(_placement(*one) for one in self._placed),
            *map(_refusal, refusals),
            *map(_eviction, self._preemption.moves),
        )
        return Plan(
            tuple(assignment for assignment, _ in self._placed),
            refusals,
            tuple(self._preemption.moves),
            tuple(self._together),
            decisions,
            is_whole=len(self._placed) + len(self._refused) == len(self._asks),
        )

    def _place(self, ask: Ask) -> None:
        unpaid = self._purse.refuse(ask)
        if unpaid is not None:
            self._refuse(ask, (unpaid,))
            return
        # Within a plan hosts only fill up: what one sandbox could not have, its equals cannot either.
        is_hopeless = ask.wants in self._hopeless
        if not is_hopeless and self._turns.is_over(ask):
            return
        choice = None if is_hopeless else _take(self._snapshot, self._cluster, ask)
        if choice is not None:
            self._keep(ask, choice)
            return
        if not is_hopeless:
            self._turns.spend(ask)
        self._hopeless.add(ask.wants)
        room = self._preemption.make_room(ask, _held(self._snapshot, ask))
        if room is not None:
            self._rooms[ask.record.sandbox_id] = room.host_id
        self._refuse(ask, room.reasons if room is not None else ())

    def _place_group(self, group: Group) -> None:
        """All of its members, or none; answers for all of them at the first one's turn."""
        for ask in group.surplus if group.is_complete else (*group.members, *group.surplus):
            self._seen.add(ask.record.sandbox_id)
            self._refuse(ask, incomplete(group, ask))
        if not group.is_complete or not group.members or self._turns.is_over(group.members[0]):
            return
        self._seen.update(ask.record.sandbox_id for ask in group.members)
        unpaid = self._purse.refuse_any(group.members)
        if unpaid is not None:
            for ask in group.members:
                self._refuse(ask, (unpaid,))
            return
        seats, _ = seat(self._cluster, group.members)
        for ask, choice in seats:
            self._keep(ask, choice)
        if seats:
            self._together.append(tuple(ask.record.sandbox_id for ask, _ in seats))
            return
        self._stuck.append(group)
        for ask in group.members:
            self._turns.spend(ask)
            self._refuse(ask, ())

    def _keep(self, ask: Ask, choice: Choice) -> None:
        """It has its host, and its share there is taken."""
        self._turns.give(ask)
        self._placed.append((_assign(ask, choice, self._now_ms, self._purse.take(ask)), choice.score))

    def _refuse(self, ask: Ask, reasons: tuple[RefusalReason, ...]) -> None:
        self._refused.append(ask)
        if reasons:
            self._told[ask.record.sandbox_id] = reasons

    def _refuse_all(self) -> tuple[Refusal, ...]:
        for group in self._stuck:
            mark = self._cluster.mark()
            _, reasons = seat(self._cluster, group.members)
            self._cluster.rollback(mark)
            self._told |= {ask.record.sandbox_id: reasons for ask in group.members}
        known: dict[Hashable, Refusal] = {}
        found = []
        for ask in self._refused:
            reasons = self._told.get(ask.record.sandbox_id, ())
            if reasons:
                hosts = self._cluster.considered(ask.wish)
                room = self._rooms.get(ask.record.sandbox_id, NO_HOST)
                found.append(Refusal(ask.record.sandbox_id, hosts, reasons, self._now_ms, host_id=room))
                continue
            if ask.wants not in known:
                known[ask.wants] = _refuse(self._snapshot, self._cluster, ask, self._now_ms)
            found.append(replace(known[ask.wants], sandbox_id=ask.record.sandbox_id))
        return tuple(found)


def _take(snapshot: Snapshot, cluster: Cluster, ask: Ask) -> Choice | None:
    """The best host, with the sandbox's share taken of it; what it holds there already for a further run is its own."""
    held = _held(snapshot, ask)
    if ask.known is not None and held is not None:
        cluster.give_back(ask.known.host_id, held)
    choice = cluster.choose(ask.demand, ask.wish)
    if choice is not None:
        cluster.take(choice.host_id, choice.share)
    elif ask.known is not None and held is not None:
        cluster.take(ask.known.host_id, held)
    return choice


def _held(snapshot: Snapshot, ask: Ask) -> Share | None:
    """What it holds on the host that has its disk, if that is registered."""
    return held_by(snapshot, ask.known) if ask.known is not None and ask.known.host_id in snapshot.hosts else None


def _assign(ask: Ask, choice: Choice, now_ms: int, accounts: tuple[str, ...]) -> Assignment:
    record, known = ask.record, ask.known
    return Assignment(
        sandbox_id=record.sandbox_id,
        tenant=record.tenant,
        host_id=choice.host_id,
        spec=record.spec,
        image_digest=choice.image_digest,
        overhead_mib=choice.share.memory_mib - record.spec.resources.memory_mib,
        goal=record.goal,
        generation=record.generation,
        created_at_ms=record.created_at_ms,
        assigned_at_ms=now_ms,
        run=record.run,
        placement=max(1, record.placement),
        first_run=max(1, known.first_run) if known is not None else record.run,
        gpus=choice.gpus,
        numa_node=choice.numa_node,
        accounts=accounts,
    )


def _refuse(snapshot: Snapshot, cluster: Cluster, ask: Ask, now_ms: int) -> Refusal:
    held = _held(snapshot, ask)
    if ask.known is not None and held is not None:
        cluster.give_back(ask.known.host_id, held)
    reasons = cluster.refuse(ask.demand, ask.wish)
    if ask.known is not None and held is not None:
        cluster.take(ask.known.host_id, held)
    return Refusal(ask.record.sandbox_id, cluster.considered(ask.wish), reasons, now_ms)


def _placement(one: Assignment, score: int) -> Decision:
    return Decision(one.sandbox_id, one.host_id, one.placement, one.gpus, score)


def _refusal(one: Refusal) -> Decision:
    return Decision(one.sandbox_id, NO_HOST, 0, refusal_codes=tuple(reason.code for reason in one.reasons))


def _eviction(move: Halt | Ending) -> Decision:
    one = move.assignment
    return Decision(one.sandbox_id, one.host_id, one.placement, refusal_codes=(PREEMPTED,))


def explain_turn(
    snapshot: Snapshot, cluster: Cluster, made: Plan, waiting: Sequence[SandboxRecord], record: SandboxRecord
) -> Explanation:
    """What is behind one sandbox's part of a plan: the cluster as it was at its turn; for a refusal, after the plan."""
    wishes = {one.sandbox_id: one for one in waiting}
    mark = cluster.mark()
    try:
        for one in made.assignments:
            if one.sandbox_id == record.sandbox_id:
                break
            ask = ask_of(snapshot, wishes[one.sandbox_id])
            _take(snapshot, cluster, replace(ask, wish=replace(ask.wish, pinned_host=one.host_id)))
        return explain_now(snapshot, cluster, record)
    finally:
        cluster.rollback(mark)


def explain_now(snapshot: Snapshot, cluster: Cluster, record: SandboxRecord) -> Explanation:
    """What would be behind a placement of the sandbox as things are, with what it holds already free for it alone.

    A sandbox that has a host may choose anew, but one that waits there for its next run.
    """
    known = snapshot.assignment_of(record)
    is_there = known is not None and known.host_id in snapshot.hosts
    mark = cluster.mark()
    try:
        if known is not None and is_there:
            cluster.give_back(known.host_id, held_by(snapshot, known))
        return cluster.explain(demand_for(snapshot, record), wish_of(snapshot, record))
    finally:
        cluster.rollback(mark)
