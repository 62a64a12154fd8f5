"""plan(snapshot, cluster, …) -> assignments and refusals. PURE: the same input gives the same plan, so it can be recomputed."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from fleet.model.assignment import Assignment, Refusal
from fleet.model.cycle import Decision
from fleet.model.ids import NO_HOST, Tenant
from fleet.model.sandbox import SandboxRecord
from scheduler.placement.cluster import Choice, Cluster
from scheduler.placement.explanation import Explanation
from scheduler.placement.snapshot import Snapshot
from scheduler.placement.wishes import demand_for, held_by, resumed, wish_of

# One plan's share of the event loop, and what commits within a blink: some seven transactions.
PLACEMENTS_MAX = 128
# Looks at a host for a sandbox that fits on none; so many take some 50 ms, with the reasons. Tenants share them: one that wants a
# thousand different impossible things waits for its own turn, and for nobody else's.
LOOKS_MAX = 200_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write: new assignments with the reservations they lead to, and why the other sandboxes have no host.

    `decisions` are all of them as they are recorded. A plan that is not whole has left sandboxes for the next.
    """

    assignments: tuple[Assignment, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    decisions: tuple[Decision, ...] = ()
    is_whole: bool = True


def plan(snapshot: Snapshot, cluster: Cluster, waiting: Sequence[SandboxRecord], *, now_ms: int, seed: int = 0) -> Plan:
    """Places those that are `waiting`, the oldest first; one that fits nowhere holds up nobody behind it.

    `cluster` is the snapshot's, and is left as it was. A sandbox that was stopped has one candidate for its next run: the host
    that has its disk. Refusals are told for the state after the plan: what is refused in it would be refused again at once. A
    tenant past its share of LOOKS_MAX has the rest of its sandboxes looked at in other plans, in another order each time.
    """
    turns = _Turns(snapshot, len(cluster), [one for one in waiting if one.not_before_ms <= now_ms], seed)
    placed: list[tuple[Assignment, int]] = []
    refused: list[SandboxRecord] = []
    hopeless: set[Hashable] = set()
    mark = cluster.mark()
    try:
        for record in turns.in_order():
            if len(placed) == PLACEMENTS_MAX:
                break
            # Within a plan hosts only fill up: what one sandbox could not have, its equals cannot either.
            wants = _wants(snapshot, record)
            if wants not in hopeless and turns.is_over(record):
                continue
            choice = None if wants in hopeless else _take(snapshot, cluster, record)
            if choice is not None:
                placed.append((_assign(snapshot, record, choice, now_ms), choice.score))
                continue
            turns.spend(record, 0 if wants in hopeless else turns.cost(record))
            hopeless.add(wants)
            refused.append(record)
        refusals = _refuse_all(snapshot, cluster, refused, now_ms)
    finally:
        cluster.rollback(mark)
    decisions = (*(_placement(*one) for one in placed), *map(_refusal, refusals))
    is_whole = len(placed) + len(refused) == len(turns)
    return Plan(tuple(assignment for assignment, _ in placed), refusals, decisions, is_whole)


class _Turns:
    """What each tenant may cost one plan."""

    def __init__(self, snapshot: Snapshot, hosts: int, waiting: Sequence[SandboxRecord], seed: int) -> None:
        self._snapshot = snapshot
        self._hosts = hosts
        self._seed = seed
        self._pending = sorted(waiting, key=lambda record: (record.created_at_ms, record.sandbox_id))
        self._share = LOOKS_MAX // max(1, len({record.tenant for record in self._pending}))
        self._spent: Counter[Tenant] = Counter()

    def __len__(self) -> int:
        return len(self._pending)

    def cost(self, record: SandboxRecord) -> int:
        """How many hosts are looked at for it in vain."""
        return 1 if self._snapshot.is_resuming(record) else self._hosts

    def spend(self, record: SandboxRecord, looks: int) -> None:
        """So many looks were in vain."""
        self._spent[record.tenant] += looks

    def is_over(self, record: SandboxRecord) -> bool:
        """Whether its tenant has had its share; of every plan each has one look at all hosts."""
        return self._spent[record.tenant] >= self._share

    def in_order(self) -> Iterator[SandboxRecord]:
        """The oldest first; among the sandboxes of a tenant that may want too much, from a place that is another for each seed."""
        own: dict[Tenant, list[SandboxRecord]] = {}
        for record in self._pending:
            own.setdefault(record.tenant, []).append(record)
        turned = {tenant: iter(self._turn(records)) for tenant, records in own.items()}
        return (next(turned[record.tenant]) for record in self._pending)

    def _turn(self, records: list[SandboxRecord]) -> list[SandboxRecord]:
        # No look costs more than all hosts: few cannot want too much, and need not be told apart.
        if len(records) * self._hosts <= self._share:
            return records
        costs = {_wants(self._snapshot, record): self.cost(record) for record in records}
        if sum(costs.values()) <= self._share:
            return records
        start = crc32(str(self._seed).encode()) % len(records)
        return records[start:] + records[:start]


def _take(snapshot: Snapshot, cluster: Cluster, record: SandboxRecord) -> Choice | None:
    """The best host, with the sandbox's share taken of it; what it holds there already for a further run is its own."""
    known = resumed(snapshot, record)
    is_there = known is not None and known.host_id in snapshot.hosts
    held = held_by(snapshot, known) if known is not None and is_there else None
    if known is not None and held is not None:
        cluster.give_back(known.host_id, held)
    choice = cluster.choose(demand_for(snapshot, record), wish_of(snapshot, record))
    if choice is not None:
        cluster.take(choice.host_id, choice.share)
    elif known is not None and held is not None:
        cluster.take(known.host_id, held)
    return choice


def _assign(snapshot: Snapshot, record: SandboxRecord, choice: Choice, now_ms: int) -> Assignment:
    known = resumed(snapshot, record)
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


def _refuse_all(snapshot: Snapshot, cluster: Cluster, refused: list[SandboxRecord], now_ms: int) -> tuple[Refusal, ...]:
    known: dict[Hashable, Refusal] = {}
    for record in refused:
        wants = _wants(snapshot, record)
        if wants not in known:
            known[wants] = _refuse(snapshot, cluster, record, now_ms)
    return tuple(replace(known[_wants(snapshot, record)], sandbox_id=record.sandbox_id) for record in refused)


def _refuse(snapshot: Snapshot, cluster: Cluster, record: SandboxRecord, now_ms: int) -> Refusal:
    demand, wish, known = demand_for(snapshot, record), wish_of(snapshot, record), resumed(snapshot, record)
    held = held_by(snapshot, known) if known is not None and known.host_id in snapshot.hosts else None
    if known is not None and held is not None:
        cluster.give_back(known.host_id, held)
    reasons = cluster.refuse(demand, wish)
    if known is not None and held is not None:
        cluster.take(known.host_id, held)
    return Refusal(record.sandbox_id, cluster.considered(wish), reasons, now_ms)


def _wants(snapshot: Snapshot, record: SandboxRecord) -> Hashable:
    """All that filters look at; a further run has a room of its own to wait for, so it wants what nobody else does."""
    if snapshot.is_resuming(record):
        return record.sandbox_id
    return demand_for(snapshot, record), wish_of(snapshot, record).avoid_hosts


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
            _take(snapshot, cluster, wishes[one.sandbox_id])
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
