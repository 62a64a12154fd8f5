"""What the leader writes when sandboxes leave their hosts, and on which conditions.

    eviction    record, order unmoved; the host's proof of life absent and
                its record unmoved, or what it has said unmoved     -> record (a further placement), order REMOVE, an event
    ending      the same                                            -> record STOP with its reason, an event
    halt        record, order, what the host has said unmoved       -> order STOP with its reason
    loss        the host's losses unmoved                           -> losses

A host that registers again writes its record: so an eviction that counted on its absence does not commit any more.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from fleet.codec import encode
from fleet.model.ids import HostId
from fleet.store.keyspace import alive_key, assignment_key, host_key, losses_key, record_key, status_key
from fleet.store.port import Delete, Put, Unmoved
from scheduler import events
from scheduler.commit import Change, unmoved
from scheduler.placement.evictions import Absence, Ending, Eviction, Halt, Loss, Move, due_moves, find_absent
from scheduler.placement.snapshot import Snapshot
from scheduler.steps import Look, Step


class Moves(Step):
    """The step of a cycle that moves and ends sandboxes; it remembers since when hosts are away, by `clock`."""

    name = "moves"

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._absent: dict[HostId, Absence] = {}

    def due(self, look: Look) -> Sequence[Change]:
        """Moves, endings, halts and losses."""
        snapshot, now_s = look.snapshot, self._clock()
        self._absent = find_absent(snapshot, self._absent, registration_of(snapshot), now_s)
        moves = due_moves(snapshot, self._absent, now_s=now_s, now_ms=look.now_ms, among=look.touched)
        return tuple(move_changes(snapshot, moves, look.now_ms))


def registration_of(snapshot: Snapshot) -> Callable[[HostId], int]:
    """At which revision a host's record stands."""
    return lambda host_id: snapshot.mod_revisions.get(host_key(host_id), 0)


def move_changes(snapshot: Snapshot, moves: Iterable[Move], now_ms: int) -> Iterator[Change]:
    """The moves as writes."""
    for move in moves:
        match move:
            case Loss(host_id, losses):
                key = losses_key(host_id)
                yield Change(unmoved(snapshot, key), (Put(key, encode(losses)) if losses else Delete(key),))
            case Halt(assignment):
                order = assignment_key(assignment.host_id, assignment.sandbox_id)
                said = status_key(assignment.host_id, assignment.sandbox_id)
                record = record_key(assignment.tenant, assignment.sandbox_id)
                yield Change(unmoved(snapshot, record, order, said), (Put(order, encode(assignment)),))
            case _:
                yield _leave(snapshot, move, now_ms)


def _leave(snapshot: Snapshot, move: Eviction | Ending, now_ms: int) -> Change:
    record, assignment = move.record, move.assignment
    place = (assignment.host_id, record.sandbox_id)
    keys = record_key(record.tenant, record.sandbox_id), assignment_key(*place)
    writes = [Put(keys[0], encode(record))]
    writes += [Put(keys[1], encode(assignment))] if isinstance(move, Eviction) else []
    told = events.moved(snapshot.records[record.sandbox_id], record, assignment.host_id, now_ms)
    conditions = (*unmoved(snapshot, *keys), *_grounds(snapshot, assignment.host_id, status_key(*place), move.absence))
    return Change(conditions, (*writes, *told))


def _grounds(snapshot: Snapshot, host_id: HostId, said: str, absence: Absence | None) -> tuple[Unmoved, ...]:
    if absence is None:
        return unmoved(snapshot, said)
    return Unmoved(alive_key(host_id), 0), Unmoved(host_key(host_id), absence.registration)
