"""The scheduler's events: names that follow from the transition, numbers that rise, and a bound on what one sandbox keeps."""

from dataclasses import replace

from fleet.codec import decode
from fleet.model.assignment import Refusal, RefusalReason
from fleet.model.event import Event
from fleet.model.sandbox import Goal, Phase, SandboxRecord
from fleet.store.keyspace import EVENTS, ROOT, events_of
from fleet.store.memory import MemoryStore
from fleet.store.port import TRANSACTION_OPS_MAX, Delete, KeyValue, Put
from scheduler import events
from scheduler.commit import HISTORIES_MAX, Change, Committer, Departure, left_behind, lifecycle_changes, plan_changes
from scheduler.placement.lifecycle import Removal
from scheduler.placement.plan import Plan
from tests.unit.scheduler.build import DEMO, NOW_MS, assignment, host, record, snapshot

ACTOR = "tenant/demo"


def changed(wish: SandboxRecord, goal: Goal) -> SandboxRecord:
    return replace(wish, goal=goal, generation=wish.generation + 1)


def told(put: Put) -> Event:
    return decode(Event, put.value)


def test_events_are_not_in_every_schedulers_memory() -> None:
    """What schedulers mirror is ROOT, and no event lies below it; one tenant's prefix holds no other's."""
    assert not EVENTS.startswith(ROOT)
    assert events.created(record(), ACTOR).key.startswith(events_of(DEMO, record().sandbox_id))
    assert events_of(DEMO, record().sandbox_id).startswith(events_of(DEMO))


def test_a_creation_and_a_change_of_goal_say_who_and_what() -> None:
    """Time, actor, call, and the state before and after."""
    made = told(events.created(record(), ACTOR))
    assert (made.kind, made.actor, made.cause, made.after) == ("sandbox.created", ACTOR, "CreateSandbox", "pending")
    put, *_ = events.goal_changed(record(), changed(record(), Goal.STOP), "operator/ann", "StopSandbox", NOW_MS)
    assert isinstance(put, Put)
    event = told(put)
    assert (event.kind, event.actor, event.cause) == ("sandbox.goal_changed", "operator/ann", "StopSandbox")
    assert (event.before, event.after, event.at_ms, event.generation) == ("run", "stop", NOW_MS, 2)


def test_a_further_run_is_resumed() -> None:
    """The first placement assigns, each later one resumes."""
    first = told(events.assigned(assignment(record(), host())))
    again = told(events.assigned(assignment(record(generation=3, run=2), host())))
    assert (first.kind, again.kind) == ("sandbox.assigned", "sandbox.resumed")
    assert (again.before, again.after, again.run, again.detail) == (Phase.PENDING, Phase.ASSIGNED, 2, "on host one")


def test_what_is_written_twice_is_written_once() -> None:
    """The key follows from the transition: a leader that decides the same again puts the same key."""
    order = assignment(record(), host())
    assert events.assigned(order, 1).key == events.assigned(order, 9).key
    assert events.created(record(), ACTOR).key != events.assigned(order).key


def test_one_sandbox_keeps_a_bounded_number_of_events() -> None:
    """After a hundred stops and starts with every kind of event between, what is kept fits into one removal's transaction."""
    wish, keys = record(), {events.created(record(), ACTOR).key}
    for number in range(200):
        after = changed(wish, Goal.STOP if number % 2 == 0 else Goal.RUN)
        for write in events.goal_changed(wish, after, ACTOR, "StopSandbox", NOW_MS):
            (keys.discard if isinstance(write, Delete) else keys.add)(write.key)
        wish = after
        keys.add(events.assigned(assignment(wish, host())).key)
        for code in "abcdefghijklmnop":
            refusal = Refusal(wish.sandbox_id, 1, (RefusalReason(code, 1, "no"),), NOW_MS)
            keys.add(events.refused(wish, refusal).key)
    entries = [KeyValue(key, events.created(record(), ACTOR).value, 1, 1) for key in sorted(keys)]
    removal = Removal(wish.sandbox_id, wish, assignment(wish, host()))
    (change,) = lifecycle_changes(snapshot(records=[wish]), [removal])
    left = left_behind(removal, Departure(NOW_MS, 0, 1, 2, is_past=False), entries)
    assert len(change.writes) + len(left) <= TRANSACTION_OPS_MAX
    assert len(keys) > 12


def test_numbers_rise_with_the_revision_and_stay() -> None:
    """Within a revision the place tells events apart; a removal puts them again under its lease with the number they had."""
    first, second = (events.assigned(assignment(record(number), host()), number) for number in (0, 1))
    entries = [KeyValue(put.key, put.value, 7, 7) for put in (first, second)]
    read = [events.read_event(entry) for entry in entries]
    numbers = [one.seq for one in read if one is not None]
    assert numbers == [events.first_seq(7), events.first_seq(7) + 1]
    assert numbers[-1] < events.first_seq(8)
    again = events.kept(entries, 5)
    assert {write.lease_id for write in again if isinstance(write, Put)} == {5}
    reread = [events.read_event(KeyValue(put.key, put.value, 9, 9)) for put in again if isinstance(put, Put)]
    assert reread == read
    assert events.read_event(KeyValue(first.key, b"\xff\xff", 1, 1)) is None


def refusal(*codes: str, hosts: int = 1) -> Refusal:
    return Refusal(
        record().sandbox_id, hosts, tuple(RefusalReason(code, hosts, f"no {code}") for code in codes), NOW_MS
    )


def test_a_refusal_is_told_when_it_is_news() -> None:
    """Other counts are stored and not told; other filters are both."""

    def writes(known: Refusal | None, new: Refusal) -> list[str]:
        seen = snapshot(records=[record()], refusals={record().sandbox_id: known} if known else {})
        keys = [write.key for change in plan_changes(seen, Plan((), (new,))) for write in change.writes]
        return ["event" if key.startswith(EVENTS) else "refusal" for key in keys]

    assert writes(None, refusal("memory")) == ["refusal", "event"]
    assert writes(refusal("memory"), refusal("memory")) == []
    assert writes(refusal("memory"), refusal("memory", hosts=2)) == ["refusal"]
    assert writes(refusal("memory"), refusal("alive", "memory")) == ["refusal", "event"]


def test_past_the_days_limit_only_the_removal_is_told() -> None:
    """A tenant that creates and removes without end fills no store: such a history goes at once, its end in hours."""
    entries = [KeyValue(events.created(record(), ACTOR).key, events.created(record(), ACTOR).value, 1, 1)]
    removal = Removal(record().sandbox_id, record(), None)
    for past in (False, True):
        writes = left_behind(removal, Departure(NOW_MS, 0, 1, 2, is_past=past), entries)
        kept = {write.key: isinstance(write, Put) for write in writes if write.key.startswith(EVENTS)}
        assert kept[entries[0].key] is not past
        assert sum(kept.values()) == (1 if past else 2)
        leases = {write.lease_id for write in writes if isinstance(write, Put) and write.key.startswith(EVENTS)}
        assert leases == {1 if past else 2}


async def test_a_removal_that_is_tried_again_counts_once() -> None:
    """Races that are lost use nothing of a tenant's day; a sandbox past it stays past it."""
    committer = Committer(MemoryStore(lambda: 0.0), lambda: 0.0)
    changes = [Change((), (), Removal(one.sandbox_id, one, None)) for one in map(record, range(HISTORIES_MAX + 1))]

    async def leases(some: list[Change]) -> set[int]:
        done = await committer.complete(some, NOW_MS)
        puts = [write for one in done for write in one.writes if isinstance(write, Put)]
        return {write.lease_id for write in puts if write.key.startswith(EVENTS)}

    (kept,), (kept_again,) = [await leases(changes[:HISTORIES_MAX]) for _ in range(2)]
    (past,) = await leases(changes[HISTORIES_MAX:])
    assert kept == kept_again != past
