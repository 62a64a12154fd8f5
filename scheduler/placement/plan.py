"""plan(snapshot, now) -> assignments and refusals. PURE: the same snapshot gives the same plan, so a decision can be recomputed."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from fleet.model.assignment import Assignment, Refusal, RefusalReason
from fleet.model.host import Capacity, Reservation, overhead_mib
from fleet.model.ids import Digest, HostId, Tenant
from fleet.model.sandbox import ImageRef, SandboxRecord, SandboxSpec
from scheduler.placement.filters import ANY_NAME, Candidate, first_excluding, refuse, resolve_image
from scheduler.placement.scores import score
from scheduler.placement.snapshot import Snapshot, free_of, growth, reserved, set_aside

# One plan's share of the event loop: 200 placements over 1,000 hosts take half a second. The rest is in the next plan.
PLACEMENTS_MAX = 200
# Looks at a host for a sandbox that fits on none; 50,000 take a quarter of a second, and the leader's lease lasts ten. Tenants
# share them: one that wants a thousand different impossible things waits for its own turn, and for nobody else's.
LOOKS_MAX = 50_000
HOST_UNKNOWN = RefusalReason("host_unknown", 0, "the host that has its disk is not registered")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write: new assignments with the reservations they lead to, and why the other sandboxes have no host.

    One that is not whole has left sandboxes for the next.
    """

    assignments: tuple[Assignment, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    is_whole: bool = True


def plan(snapshot: Snapshot, now_ms: int, waiting: Sequence[SandboxRecord] | None = None) -> Plan:
    """Places those that are `waiting`, by default all that do, the oldest first; one that fits nowhere holds up nobody behind it.

    A sandbox that was stopped has one candidate for its next run: the host that has its disk. Refusals are told for the state
    after the plan: what is refused in it would be refused again at once. A tenant past its share of LOOKS_MAX has the rest of its
    sandboxes looked at in other plans, and its own order is another each time.
    """
    candidates = _candidates(snapshot, now_ms)
    waiting = snapshot.pending() if waiting is None else waiting
    turns = _Turns(snapshot, len(candidates), [one for one in waiting if one.not_before_ms <= now_ms])
    assignments: list[Assignment] = []
    refused: list[SandboxRecord] = []
    hopeless: set[Hashable] = set()
    for record in turns.in_order(now_ms):
        if len(assignments) == PLACEMENTS_MAX:
            break
        # Within a plan hosts only fill up: what one sandbox could not have, its equals cannot either.
        wants = _wants(snapshot, record)
        if wants not in hopeless and turns.is_over(record):
            continue
        assignment = None if wants in hopeless else _place(snapshot, candidates, record, now_ms)
        if assignment is None:
            turns.spend(record, 0 if wants in hopeless else turns.cost(record))
            hopeless.add(wants)
            refused.append(record)
            continue
        assignments.append(assignment)
        taken = candidates[assignment.host_id]
        candidates[assignment.host_id] = replace(taken, free=free_of(taken.free, growth(snapshot, assignment)))
    is_whole = len(assignments) + len(refused) == len(turns)
    return Plan(tuple(assignments), _refuse_all(snapshot, refused, candidates, now_ms), is_whole)


class _Turns:
    """What each tenant may cost one plan."""

    def __init__(self, snapshot: Snapshot, hosts: int, waiting: Sequence[SandboxRecord]) -> None:
        self._snapshot = snapshot
        self._hosts = hosts
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

    def in_order(self, now_ms: int) -> Iterator[SandboxRecord]:
        """The oldest first; among the sandboxes of a tenant that may want too much, from a place that is another at each time."""
        own: dict[Tenant, list[SandboxRecord]] = {}
        for record in self._pending:
            own.setdefault(record.tenant, []).append(record)
        turned = {tenant: iter(self._turn(records, now_ms)) for tenant, records in own.items()}
        return (next(turned[record.tenant]) for record in self._pending)

    def _turn(self, records: list[SandboxRecord], now_ms: int) -> list[SandboxRecord]:
        costs = {_wants(self._snapshot, record): self.cost(record) for record in records}
        if sum(costs.values()) <= self._share:
            return records
        start = crc32(str(now_ms).encode()) % len(records)
        return records[start:] + records[:start]


def _candidates(snapshot: Snapshot, now_ms: int) -> dict[HostId, Candidate]:
    sums = reserved(snapshot)
    return {
        host_id: Candidate(
            host,
            free_of(host.capacity, sums.get(host_id, Reservation(host_id))),
            is_alive=host_id in snapshot.alive,
            is_readable=host_id not in snapshot.opaque_hosts,
            is_cordoned=host_id in snapshot.cordons,
            is_backing_off=snapshot.is_backing_off(host_id, now_ms),
        )
        for host_id, host in sorted(snapshot.hosts.items())
    }


def _place(
    snapshot: Snapshot, candidates: dict[HostId, Candidate], record: SandboxRecord, now_ms: int
) -> Assignment | None:
    spec, able = _narrow(snapshot, candidates, record)
    holders = [snapshot.sources.get((record.tenant, source.digest), frozenset()) for source in spec.sources]
    best = min(
        (one for one in able if first_excluding(spec, one) is None),
        key=lambda one: score(spec, one, has_sources=all(one.record.host_id in holding for holding in holders)),
        default=None,
    )
    if best is None:
        return None
    assignment = _assign(record, best, resolve_image(spec.image, best.record), now_ms)
    known = snapshot.assignment_of(record)
    return replace(assignment, first_run=max(1, known.first_run)) if known is not None else assignment


def _narrow(
    snapshot: Snapshot, candidates: dict[HostId, Candidate], record: SandboxRecord
) -> tuple[SandboxSpec, tuple[Candidate, ...]]:
    """What filters shall look for and on which hosts: for a further run the very image its disk lies on, on the host that has it.

    There its disk and its place are set aside already: they are free for it alone.
    """
    known = snapshot.assignment_of(record) if snapshot.is_resuming(record) else None
    if known is None:
        remains = snapshot.remains_of(record.sandbox_id)
        return record.spec, tuple(
            replace(one, is_leaving=True) if host_id in remains else one for host_id, one in candidates.items()
        ) if remains else tuple(candidates.values())
    pinned = replace(record.spec, image=ImageRef(ANY_NAME, known.image_digest))
    own = candidates.get(known.host_id)
    if own is None:
        return pinned, ()
    held = set_aside(known, snapshot.status_of(known))
    free = Capacity(
        own.free.vcpus + held.vcpus,
        own.free.memory_mib + held.memory_mib,
        own.free.disk_mib + held.disk_mib,
        own.free.sandboxes + held.sandboxes,
    )
    return pinned, (replace(own, free=free),)


def _assign(record: SandboxRecord, candidate: Candidate, image_digest: Digest, now_ms: int) -> Assignment:
    return Assignment(
        sandbox_id=record.sandbox_id,
        tenant=record.tenant,
        host_id=candidate.record.host_id,
        spec=record.spec,
        image_digest=image_digest,
        overhead_mib=overhead_mib(record.spec.resources, candidate.record.accelerator),
        goal=record.goal,
        generation=record.generation,
        created_at_ms=record.created_at_ms,
        assigned_at_ms=now_ms,
        run=record.run,
        placement=max(1, record.placement),
        first_run=record.run,
    )


def _refuse_all(
    snapshot: Snapshot, refused: list[SandboxRecord], candidates: dict[HostId, Candidate], now_ms: int
) -> tuple[Refusal, ...]:
    known: dict[Hashable, Refusal] = {}
    for record in refused:
        wants = _wants(snapshot, record)
        if wants not in known:
            spec, considered = _narrow(snapshot, candidates, record)
            refusal = refuse(record.sandbox_id, spec, considered, now_ms)
            if not considered and snapshot.is_resuming(record):
                refusal = replace(refusal, reasons=(HOST_UNKNOWN,))
            known[wants] = refusal
    return tuple(replace(known[_wants(snapshot, record)], sandbox_id=record.sandbox_id) for record in refused)


def _wants(snapshot: Snapshot, record: SandboxRecord) -> Hashable:
    """All that filters look at; a further run has a room of its own to wait for, so it wants what nobody else does."""
    if snapshot.is_resuming(record) or snapshot.remains_of(record.sandbox_id):
        return record.sandbox_id
    spec = record.spec
    return spec.resources, spec.image, spec.network.mode, spec.require_labels
