"""The scheduler's part of what happened to a sandbox: one event for each transition, written with it in one transaction.

A key's name follows from the transition, so what is written twice is written once. Where the other events of a transaction have
a place in it, `seq` is that place; a reader joins it with the revision, which makes it unique and rising over all sandboxes.

    created -> refused* -> assigned -> goal_changed -> resumed -> evicted -> assigned -> ... -> goal_changed -> removed
"""

import zlib
from collections.abc import Iterable
from dataclasses import replace

from fleet.codec import decode, encode
from fleet.errors import BedplateError
from fleet.model.assignment import Assignment, Refusal
from fleet.model.event import Event
from fleet.model.ids import SandboxId, Tenant
from fleet.model.sandbox import Phase, SandboxRecord
from fleet.store.keyspace import event_key
from fleet.store.port import Delete, KeyValue, Put, Write

ORIGIN = "scheduler"
# One sandbox keeps the events of so many changes of its goal: six stops and starts. Its removal puts all of them again in one
# transaction, which takes 120 writes.
GENERATIONS_KEPT = 12
# Different refusals of one generation that are kept; the same filters again take the same place.
REFUSALS_KEPT = 4
# A transaction has at most 120 writes, so a place in it takes 7 bits.
PLACES = 128
DETAIL_CHARS_MAX = 400
REMOVED = "sandbox.removed"


def created(record: SandboxRecord, actor: str, place: int = 0) -> Put:
    """A wish was written."""
    detail = f"{record.spec.name} of image {record.spec.image.name}"
    about, seq = _about(record), place % PLACES
    event = replace(about, seq=seq, at_ms=record.created_at_ms, actor=actor, cause="CreateSandbox", detail=detail)
    return _put(replace(event, kind="sandbox.created", after=Phase.PENDING), "created")


def goal_changed(before: SandboxRecord, after: SandboxRecord, actor: str, cause: str, now_ms: int) -> list[Write]:
    """A wish has changed; the events of the generation that is too old to be kept go."""
    event = replace(_about(after), at_ms=now_ms, actor=actor, cause=cause, before=before.goal, after=after.goal)
    return [_put(replace(event, kind="sandbox.goal_changed"), "goal"), *_outdated(after)]


def moved(before: SandboxRecord, after: SandboxRecord, host_id: str, now_ms: int) -> list[Write]:
    """The scheduler takes a sandbox from its host, to place it on another or to end it, and says why."""
    assert after.reason is not None
    is_end = after.goal is not before.goal
    event = replace(_about(after), at_ms=now_ms, actor=ORIGIN, cause=after.reason.code, detail=after.reason.message)
    kind = "sandbox.ended" if is_end else "sandbox.evicted"
    event = replace(event, kind=kind, before=host_id, after=after.goal if is_end else Phase.PENDING)
    return [_put(event, "goal"), *_outdated(after)]


def assigned(assignment: Assignment, place: int = 0) -> Put:
    """A sandbox has a host, for its first run or a further one."""
    event = Event(
        sandbox_id=assignment.sandbox_id,
        tenant=assignment.tenant,
        origin=ORIGIN,
        seq=place % PLACES,
        at_ms=assignment.assigned_at_ms,
        actor=ORIGIN,
        kind="sandbox.assigned" if assignment.run <= max(1, assignment.first_run) else "sandbox.resumed",
        before=Phase.PENDING,
        after=Phase.ASSIGNED,
        detail=_where(assignment),
        generation=assignment.generation,
        run=assignment.run,
    )
    return _put(event, "assigned")


def _where(assignment: Assignment) -> str:
    on = f"on host {assignment.host_id}"
    return on if assignment.placement <= 1 else f"{on}, placement {assignment.placement}"


def refused(record: SandboxRecord, refusal: Refusal, place: int = 0) -> Put:
    """No host takes a sandbox, for other reasons than before."""
    said = "; ".join(f"{reason.hosts} of {refusal.hosts_considered}: {reason.message}" for reason in refusal.reasons)
    event = replace(
        _about(record),
        seq=place % PLACES,
        at_ms=refusal.at_ms,
        actor=ORIGIN,
        kind="sandbox.refused",
        cause=refusal.reasons[0].code,
        before=Phase.PENDING,
        after=Phase.PENDING,
        detail=said[:DETAIL_CHARS_MAX],
    )
    slot = zlib.crc32(" ".join(codes_of(refusal)).encode()) % REFUSALS_KEPT
    return _put(event, f"refused-{slot}")


def removed(owner: SandboxRecord | Assignment, now_ms: int, lease_id: int, place: int = 0) -> Put:
    """Nothing is left of a sandbox."""
    event = replace(_about(owner), seq=place % PLACES, at_ms=now_ms, actor=ORIGIN, kind=REMOVED)
    return _put(replace(event, before=Phase.REMOVING, after=Phase.REMOVED), "removed", lease_id)


def kept(entries: Iterable[KeyValue], lease_id: int) -> list[Write]:
    """The events of a removed sandbox, put again under the lease that ends them, each with the number it has."""
    events = [(entry.key, read_event(entry)) for entry in entries]
    return [Put(key, encode(event), lease_id) for key, event in events if event is not None]


def read_event(entry: KeyValue) -> Event | None:
    """The event of a key, with its number; None for what cannot be read."""
    try:
        event = decode(Event, entry.value)
    except BedplateError:
        return None
    return event if event.seq >= PLACES else replace(event, seq=first_seq(entry.mod_revision) + event.seq)


def first_seq(revision: int) -> int:
    """The lowest number of an event that is written at `revision`."""
    return revision * PLACES


def codes_of(refusal: Refusal | None) -> tuple[str, ...]:
    """What a refusal is about, without its counts."""
    return tuple(reason.code for reason in refusal.reasons) if refusal is not None else ()


_WORDS = ("goal", "assigned", *(f"refused-{slot}" for slot in range(REFUSALS_KEPT)))


def _outdated(after: SandboxRecord) -> list[Write]:
    """The events of the generation that is too old to be kept."""
    old = after.generation - GENERATIONS_KEPT
    return [Delete(event_key(after.tenant, after.sandbox_id, _name(old, word))) for word in _WORDS if old > 0]


def _about(owner: SandboxRecord | Assignment) -> Event:
    generation, run = owner.generation, owner.run
    return Event(owner.sandbox_id, owner.tenant, ORIGIN, 0, 0, "", "", generation=generation, run=run)


def _put(event: Event, word: str, lease_id: int = 0) -> Put:
    key = event_key(Tenant(event.tenant), SandboxId(event.sandbox_id), _name(event.generation, word))
    return Put(key, encode(event), lease_id)


def _name(generation: int, word: str) -> str:
    return f"{generation:010d}-{word}"
