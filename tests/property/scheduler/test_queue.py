"""What holds for groups, preemption and fairness in every plan, against brute force on small fleets."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.codec import encode
from fleet.model.assignment import Assignment
from fleet.model.host import Capacity, HostRecord, Reservation
from fleet.model.ids import HostId, SandboxId, Tenant
from fleet.model.sandbox import Agent, Goal, Phase, Placement, Resources, Restart, SandboxRecord
from scheduler.decisions import digest_of
from scheduler.placement.evictions import Ending, Eviction, Halt, due_moves
from scheduler.placement.groups import GROUP_INCOMPLETE
from scheduler.placement.plan import Plan
from scheduler.placement.preemption import PREEMPTING
from scheduler.placement.snapshot import Snapshot
from tests.unit.scheduler.build import DEMO, NOW_MS, OTHER, assignment, host, planned, record, snapshot, spec, status

# A property of plans takes seconds of a processor.
pytestmark = pytest.mark.slow

# Rounds until nothing is left to do: each may place, or end one more of what ran.
ROUNDS_MAX = 60
DISK_MIB = 1024


def wish(number: int, placement: Placement, resources: Resources, *, restarts: bool = True) -> SandboxRecord:
    restart = Restart.ALWAYS if restarts else Restart.NO
    agent = Agent("worker", "custom", ("true",), memory_mib=256, restart=restart)
    return record(number, spec=spec(number, agents=(agent,), placement=placement, resources=resources))


shapes = st.builds(Resources, st.integers(1, 3), st.just(256), st.sampled_from([DISK_MIB, 2 * DISK_MIB]))


@st.composite
def carriers(draw: st.DrawFn) -> list[HostRecord]:
    """One to three small hosts."""
    capacities = st.builds(
        Capacity, st.integers(1, 4), st.just(99_999), st.integers(1, 4).map(lambda units: units * DISK_MIB), st.just(4)
    )
    return [host(f"host-{number}", capacity=draw(capacities)) for number in range(draw(st.integers(1, 3)))]


@st.composite
def fleets(draw: st.DrawFn, priorities: st.SearchStrategy[int], groups: Sequence[str] = ("",)) -> Snapshot:
    """Hosts on which something runs, not more than they carry, and a few that wait, some of them in groups."""
    hosts, runs, orders, waits = draw(carriers()), [], [], []
    left = {one.host_id: one.capacity for one in hosts}
    for number in range(draw(st.integers(0, 6))):
        one = wish(number, Placement(draw(priorities)), draw(shapes), restarts=draw(st.booleans()))
        where = draw(st.sampled_from(hosts))
        asked, room = one.spec.resources, left[where.host_id]
        if asked.vcpus <= room.vcpus and asked.disk_mib <= room.disk_mib and room.sandboxes:
            left[where.host_id] = replace(
                room,
                vcpus=room.vcpus - asked.vcpus,
                disk_mib=room.disk_mib - asked.disk_mib,
                sandboxes=room.sandboxes - 1,
            )
            runs.append(one)
            # What is in its second run has begun, and moves only if it restarts.
            run = draw(st.integers(1, 2))
            runs[-1] = replace(one, run=run)
            orders.append(assignment(runs[-1], where, run=run, assigned_at_ms=NOW_MS - draw(st.integers(0, 5))))
    sizes = {name: draw(st.integers(2, 3)) for name in groups}
    for number in range(10, 10 + draw(st.integers(1, 6))):
        group = draw(st.sampled_from(groups))
        placement = Placement(draw(priorities), group=group, group_size=sizes[group] if group else 0)
        waits.append(wish(number, placement, draw(shapes), restarts=draw(st.booleans())))
    statuses = [status(one, Phase.RUNNING) for one in orders]
    return snapshot(records=[*runs, *waits], assignments=orders, statuses=statuses, hosts=hosts)


PRIORITIES = st.integers(0, 2)
singles = fleets(PRIORITIES)
mixed = fleets(PRIORITIES, ("", "", "a", "b"))
grouped = fleets(st.just(0), ("", "a", "b"))


def after(seen: Snapshot, made: Plan) -> Snapshot:
    """The store once the plan is committed."""
    assignments = {**seen.assignments, **{one.sandbox_id: one for one in made.assignments}}
    records = dict(seen.records)
    for move in made.evictions:
        match move:
            case Halt(order):
                assignments[order.sandbox_id] = order
            case Ending(ended, _):
                records[ended.sandbox_id] = ended
    refusals = {one.sandbox_id: one for one in made.refusals}
    return replace(seen, assignments=assignments, records=records, refusals=refusals)


def used(seen: Snapshot, host_id: HostId) -> Reservation:
    return seen.reserved_by_host.get(host_id, Reservation(host_id))


def has_room(capacity: Capacity, held: Reservation, asked: Sequence[Resources]) -> bool:
    return (
        held.vcpus + sum(one.vcpus for one in asked) <= capacity.vcpus
        and held.disk_mib + sum(one.disk_mib for one in asked) <= capacity.disk_mib
        and held.sandboxes + len(asked) <= capacity.sandboxes
    )


def can_seat(seen: Snapshot, members: Sequence[SandboxRecord]) -> bool:
    """Whether any way of sharing the members out over the hosts fits."""
    for where in product(seen.hosts.values(), repeat=len(members)):
        asked: dict[HostId, list[Resources]] = {}
        for one, carrier in zip(members, where, strict=True):
            asked.setdefault(carrier.host_id, []).append(one.spec.resources)
        if all(has_room(seen.hosts[one].capacity, used(seen, one), wanted) for one, wanted in asked.items()):
            return True
    return False


@settings(deadline=None)
@given(mixed)
def test_a_plan_with_groups_and_preemption_never_overcommits(seen: Snapshot) -> None:
    """Whatever room is being made: until it is free, hosts carry no more than they have."""
    left = after(seen, planned(seen))
    for host_id, carrier in left.hosts.items():
        assert has_room(carrier.capacity, used(left, host_id), ())


@settings(deadline=None)
@given(mixed)
def test_groups_are_whole(seen: Snapshot) -> None:
    """Of each group that waits as many are placed as it has members, or none."""
    made = planned(seen)
    wishes = [seen.records[one.sandbox_id].spec.placement for one in made.assignments]
    counts = Counter((one.group, one.group_size, one.priority) for one in wishes if one.group)
    assert all(count == size for (_, size, _), count in counts.items())
    assert sorted(map(len, made.together)) == sorted(counts.values())


@settings(deadline=None)
@given(grouped)
def test_a_refused_group_cannot_be_seated(seen: Snapshot) -> None:
    """Brute force finds no arrangement either, on the fleet as the plan leaves it."""
    made = planned(seen)
    left = after(seen, made)
    refused: dict[str, list[SandboxRecord]] = {}
    for one in made.refusals:
        found = seen.records[one.sandbox_id]
        if found.spec.placement.group and "finds no host" in one.reasons[0].message:
            assert one.reasons[0].code == GROUP_INCOMPLETE
            refused.setdefault(found.spec.placement.group, []).append(found)
        elif not found.spec.placement.group:
            assert not can_seat(left, [found])
    for members in refused.values():
        assert not can_seat(left, members)


def lower(seen: Snapshot, host_id: HostId, priority: int) -> list[Assignment]:
    orders = (one for one in seen.assignments.values() if one.host_id == host_id)
    return [one for one in orders if one.spec.placement.priority < priority]


def room_without(seen: Snapshot, host_id: HostId, gone: Sequence[Assignment]) -> Reservation:
    """What is set aside on a host once those have left: one that does not go elsewhere leaves its disk."""
    held = used(seen, host_id)
    for one in gone:
        moves = seen.records[one.sandbox_id].spec.agents[0].restart is not Restart.NO or one.run == 1
        disk_mib, place = (one.spec.resources.disk_mib, 1) if moves else (0, 0)
        held = replace(
            held,
            vcpus=held.vcpus - one.spec.resources.vcpus,
            disk_mib=held.disk_mib - disk_mib,
            sandboxes=held.sandboxes - place,
        )
    return held


def subsets(orders: Sequence[Assignment]) -> Iterator[tuple[Assignment, ...]]:
    return chain.from_iterable(combinations(orders, count) for count in range(len(orders) + 1))


@settings(deadline=None)
@given(singles)
def test_preemption_is_what_brute_force_would_do(seen: Snapshot) -> None:
    """One that waits alone: those who end are of lower priority, all are needed, none of a higher priority than must be; and where
    nobody ends, no set of lower ones would have made room."""
    waits = seen.pending()[0]
    seen = replace(
        seen,
        records={key: one for key, one in seen.records.items() if key in seen.assignments} | {waits.sandbox_id: waits},
    )
    made, priority, asked = planned(seen), waits.spec.placement.priority, [waits.spec.resources]
    ways = [
        gone
        for host_id, carrier in seen.hosts.items()
        for gone in subsets(lower(seen, host_id, priority))
        if has_room(carrier.capacity, room_without(seen, host_id, gone), asked)
    ]
    if made.assignments:
        assert () in ways
        assert made.evictions == ()
        return
    if not ways:
        assert made.evictions == ()
        assert PREEMPTING not in [reason.code for reason in made.refusals[0].reasons]
        return
    assert [reason.code for reason in made.refusals[0].reasons] == [PREEMPTING]
    victims = {one.assignment.sandbox_id for one in made.evictions}
    assert victims in [{one.sandbox_id for one in way} for way in ways]
    assert not any({one.sandbox_id for one in way} < victims for way in ways)
    top = max(seen.records[one].spec.placement.priority for one in victims)
    assert top == min(max(one.spec.placement.priority for one in way) for way in ways)


@settings(deadline=None)
@given(mixed)
def test_nobody_ends_for_an_equal(seen: Snapshot) -> None:
    """Each that ends is of a lower priority than some that is refused with `preempting`, and nobody ends without one."""
    made = planned(seen)
    waits = [seen.records[one.sandbox_id] for one in made.refusals if one.reasons[0].code == PREEMPTING]
    for move in made.evictions:
        below = move.assignment.spec.placement.priority
        assert any(below < one.spec.placement.priority for one in waits)
    ended = [one.assignment.sandbox_id for one in made.evictions]
    assert len(set(ended)) == len(ended)


@settings(deadline=None)
@given(mixed, st.randoms(use_true_random=False))
def test_the_same_input_is_the_same_plan_in_bytes(seen: Snapshot, chance: random.Random) -> None:
    """In whatever order the store was read: assignments, refusals, evictions and their record are the same bytes."""
    names = ("records", "assignments", "statuses", "hosts")
    parts: dict[str, Any] = {}
    for name in names:
        entries = list(getattr(seen, name).items())
        chance.shuffle(entries)
        parts[name] = dict(entries)
    one, other = planned(seen), planned(replace(seen, **parts))
    assert one == other
    assert [encode(each) for each in one.assignments] == [encode(each) for each in other.assignments]
    assert digest_of(one.decisions) == digest_of(other.decisions)


def settled(seen: Snapshot) -> Snapshot:
    """What hosts do until the next look: what shall stop has stopped, what moves is gone, what was placed runs."""
    records, assignments = dict(seen.records), dict(seen.assignments)
    statuses = {}
    for order in assignments.values():
        stops = Goal.STOP in (order.goal, records[order.sandbox_id].goal)
        phase = Phase.STOPPED if stops else Phase.RUNNING
        statuses[order.host_id, order.sandbox_id] = status(order, phase, released=stops, placement=order.placement)
    stopped = replace(seen, statuses=statuses)
    for move in due_moves(stopped, {}, now_s=0.0, now_ms=NOW_MS):
        if isinstance(move, Eviction):
            records[move.record.sandbox_id] = replace(move.record, not_before_ms=0)
            statuses.pop((move.assignment.host_id, move.record.sandbox_id))
            del assignments[move.record.sandbox_id]
    return replace(stopped, records=records, assignments=assignments)


@settings(deadline=None)
@given(mixed)
def test_rounds_come_to_an_end(seen: Snapshot) -> None:
    """Preemption goes round no circle: after some rounds nothing is placed, nobody ends, and each has ended once at most."""
    ended: Counter[SandboxId] = Counter()
    for _ in range(ROUNDS_MAX):
        made = planned(seen)
        ended.update(one.assignment.sandbox_id for one in made.evictions)
        if (
            not made.assignments
            and not made.evictions
            and not any(_waits_for_room(one.reasons[0].code) for one in made.refusals)
        ):
            break
        seen = settled(after(seen, made))
    else:
        raise AssertionError(f"still at it: {made}")
    # Each that was preempted was so by one of a higher priority: with three priorities it happens twice at most.
    assert all(count <= 2 for count in ended.values())


def _waits_for_room(code: str) -> bool:
    return code == PREEMPTING


@settings(deadline=None)
@given(singles)
def test_room_that_is_made_is_kept(seen: Snapshot) -> None:
    """Once those that were to end have left, the highest priority has the room, whoever else would have fitted into it."""
    waits = seen.pending()
    first = max(waits, key=lambda one: one.spec.placement.priority)
    rest = [one for one in waits if one.spec.placement.priority < first.spec.placement.priority]
    kept = {key: one for key, one in seen.records.items() if key in seen.assignments}
    seen = replace(seen, records=kept | {one.sandbox_id: one for one in (first, *rest)})
    made = planned(seen)
    codes = {one.sandbox_id: one.reasons[0].code for one in made.refusals}
    if codes.get(first.sandbox_id) == PREEMPTING:
        again = planned(settled(after(seen, made)))
        assert first.sandbox_id in [one.sandbox_id for one in again.assignments]


@settings(deadline=None)
@given(mixed)
def test_an_interrupted_plan_is_carried_on(seen: Snapshot) -> None:
    """Only the evictions were written, or only the placements: the plans after it come to an end, and overcommit nothing."""
    made = planned(seen)
    for part in (replace(made, assignments=(), together=()), replace(made, evictions=())):
        later = settled(after(seen, part))
        for _ in range(ROUNDS_MAX):
            again = planned(later)
            left = after(later, again)
            assert all(has_room(one.capacity, used(left, host_id), ()) for host_id, one in left.hosts.items())
            if left.assignments == later.assignments and not again.evictions:
                break
            later = settled(left)
        else:
            raise AssertionError("still at it")


@settings(deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.integers(0, 6))
def test_greedy_tenants_get_the_same(sizes: list[int], lead: int) -> None:
    """Two that each want all of the fleet have shares that differ by one sandbox at most, however early one of them asked."""
    hosts = [host(f"host-{number}", capacity=Capacity(size, 99_999, 999_999, 99)) for number, size in enumerate(sizes)]
    total = sum(sizes)
    wishes = []
    for tenant, late in ((DEMO, 0), (OTHER, lead)):
        for number in range(total):
            made = wish(number + (500 if tenant == OTHER else 0), Placement(), Resources(1, 256, 64))
            wishes.append(replace(made, tenant=tenant, created_at_ms=NOW_MS + late + number))
    counts: Counter[Tenant] = Counter(one.tenant for one in planned(snapshot(records=wishes, hosts=hosts)).assignments)
    assert counts[DEMO] + counts[OTHER] == total
    assert abs(counts[DEMO] - counts[OTHER]) <= 1


@settings(deadline=None)
@given(singles)
def test_nobody_is_starved(seen: Snapshot) -> None:
    """While sandboxes end, whoever fits on an empty host is placed in the end, whatever its priority."""
    for _ in range(ROUNDS_MAX):
        seen = settled(after(seen, planned(seen)))
        waits = [
            one
            for one in seen.pending()
            if any(
                has_room(each.capacity, Reservation(each.host_id), [one.spec.resources]) for each in seen.hosts.values()
            )
        ]
        if not waits:
            return
        # The first that runs is done, and is removed.
        over = min(seen.assignments, default=None)
        gone = {over} if over is not None else set()
        seen = replace(
            seen,
            records={key: one for key, one in seen.records.items() if key not in gone},
            assignments={key: one for key, one in seen.assignments.items() if key not in gone},
            statuses={key: one for key, one in seen.statuses.items() if key[1] not in gone},
        )
    raise AssertionError(f"never placed: {waits}")
