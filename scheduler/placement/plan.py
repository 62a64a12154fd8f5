"""plan(snapshot, now) -> assignments and refusals. PURE: the same snapshot gives the same plan, so a decision can be recomputed."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from fleet.model.assignment import Assignment, Refusal
from fleet.model.host import Reservation, overhead_mib
from fleet.model.ids import HostId
from fleet.model.sandbox import SandboxRecord, SandboxSpec
from scheduler.placement.filters import Candidate, first_excluding, refuse, resolve_image
from scheduler.placement.scores import score
from scheduler.placement.snapshot import Snapshot, free_of, reserved, share_of

# One plan's share of the event loop: 200 placements over 1,000 hosts take half a second. The rest is in the next plan.
PLACEMENTS_MAX = 200


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write: new assignments with the reservations they lead to, and why the other sandboxes have no host."""

    assignments: tuple[Assignment, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def plan(snapshot: Snapshot, now_ms: int) -> Plan:
    """Places the pending sandboxes, the oldest first; one that fits nowhere does not hold up those behind it.

    Refusals are told for the state after the plan: what is refused in it would be refused again at once.
    """
    candidates = _candidates(snapshot)
    assignments: list[Assignment] = []
    refused: list[SandboxRecord] = []
    hopeless: set[Hashable] = set()
    for record in snapshot.pending():
        if len(assignments) == PLACEMENTS_MAX:
            break
        # Within a plan hosts only fill up: what one sandbox could not have, its equals cannot either.
        best = None if _wants(record.spec) in hopeless else _best(snapshot, candidates, record)
        if best is None:
            hopeless.add(_wants(record.spec))
            refused.append(record)
            continue
        assignment = _assign(record, best, now_ms)
        assignments.append(assignment)
        candidates[best.record.host_id] = replace(best, free=free_of(best.free, share_of(assignment)))
    return Plan(tuple(assignments), _refuse_all(refused, candidates, now_ms))


def _candidates(snapshot: Snapshot) -> dict[HostId, Candidate]:
    sums = reserved(snapshot)
    return {
        host_id: Candidate(
            host,
            free_of(host.capacity, sums.get(host_id, Reservation(host_id))),
            is_alive=host_id in snapshot.alive,
            is_readable=host_id not in snapshot.opaque_hosts,
            is_cordoned=host_id in snapshot.cordons,
        )
        for host_id, host in sorted(snapshot.hosts.items())
    }


def _best(snapshot: Snapshot, candidates: dict[HostId, Candidate], record: SandboxRecord) -> Candidate | None:
    holders = [snapshot.sources.get((record.tenant, source.digest), frozenset()) for source in record.spec.sources]
    able = [one for one in candidates.values() if first_excluding(record.spec, one) is None]
    return min(
        able,
        key=lambda one: score(record.spec, one, has_sources=all(one.record.host_id in holding for holding in holders)),
        default=None,
    )


def _assign(record: SandboxRecord, candidate: Candidate, now_ms: int) -> Assignment:
    return Assignment(
        sandbox_id=record.sandbox_id,
        tenant=record.tenant,
        host_id=candidate.record.host_id,
        spec=record.spec,
        image_digest=resolve_image(record.spec.image, candidate.record),
        overhead_mib=overhead_mib(record.spec.resources, candidate.record.accelerator),
        goal=record.goal,
        generation=record.generation,
        created_at_ms=record.created_at_ms,
        assigned_at_ms=now_ms,
    )


def _refuse_all(refused: list[SandboxRecord], candidates: dict[HostId, Candidate], now_ms: int) -> tuple[Refusal, ...]:
    hosts = tuple(candidates.values())
    known: dict[Hashable, Refusal] = {}
    for record in refused:
        wants = _wants(record.spec)
        if wants not in known:
            known[wants] = refuse(record.sandbox_id, record.spec, hosts, now_ms)
    return tuple(replace(known[_wants(record.spec)], sandbox_id=record.sandbox_id) for record in refused)


def _wants(spec: SandboxSpec) -> Hashable:
    """All of a spec that filters look at."""
    return spec.resources, spec.image, spec.network.mode, spec.require_labels
