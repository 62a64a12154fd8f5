"""plan(snapshot, cluster, …) -> assignments and refusals. PURE: the same input gives the same plan, so it can be recomputed."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from fleet.model.assignment import Assignment, Refusal
from fleet.model.cycle import Decision
from fleet.model.ids import NO_HOST
from fleet.model.sandbox import SandboxRecord
from scheduler.placement.cluster import Choice, Cluster
from scheduler.placement.explanation import Explanation
from scheduler.placement.hosts import Share
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

    `decisions` are all of them as they are recorded. A plan that is not whole has left sandboxes for the next.
    """

    assignments: tuple[Assignment, ...] = ()
    refusals: tuple[Refusal, ...] = ()
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
    tenant past its share of looks has the rest of its sandboxes looked at in other plans, in another order each time.
    """
    asks = [ask_of(snapshot, record) for record in waiting if record.not_before_ms <= now_ms]
    turns = Turns(snapshot, len(cluster), asks, settings, seed)
    placed: list[tuple[Assignment, int]] = []
    refused: list[Ask] = []
    hopeless: set[Hashable] = set()
    mark = cluster.mark()
    try:
        while len(placed) < PLACEMENTS_MAX and (ask := turns.next()) is not None:
            # Within a plan hosts only fill up: what one sandbox could not have, its equals cannot either.
            is_hopeless = ask.wants in hopeless
            if not is_hopeless and turns.is_over(ask):
                continue
            choice = None if is_hopeless else _take(snapshot, cluster, ask)
            if choice is not None:
                turns.give(ask)
                placed.append((_assign(ask, choice, now_ms), choice.score))
                continue
            if not is_hopeless:
                turns.spend(ask)
            hopeless.add(ask.wants)
            refused.append(ask)
        refusals = _refuse_all(snapshot, cluster, refused, now_ms)
    finally:
        cluster.rollback(mark)
    decisions = (*(_placement(*one) for one in placed), *map(_refusal, refusals))
    is_whole = len(placed) + len(refused) == len(asks)
    return Plan(tuple(assignment for assignment, _ in placed), refusals, decisions, is_whole)


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


def _assign(ask: Ask, choice: Choice, now_ms: int) -> Assignment:
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
    )


def _refuse_all(snapshot: Snapshot, cluster: Cluster, refused: list[Ask], now_ms: int) -> tuple[Refusal, ...]:
    known: dict[Hashable, Refusal] = {}
    for ask in refused:
        if ask.wants not in known:
            known[ask.wants] = _refuse(snapshot, cluster, ask, now_ms)
    return tuple(replace(known[ask.wants], sandbox_id=ask.record.sandbox_id) for ask in refused)


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
            _take(snapshot, cluster, ask_of(snapshot, wishes[one.sandbox_id]))
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
