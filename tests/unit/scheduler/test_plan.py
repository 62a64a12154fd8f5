"""Which host a sandbox gets, and in which order sandboxes get theirs."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.model.assignment import Assignment
from fleet.model.host import UNTAGGED, Capacity, Gpu, HostImage, HostRecord, NumaNode
from fleet.model.ids import Digest, HostId
from fleet.model.sandbox import Goal, Phase, Resources, SandboxRecord, SandboxStatus
from scheduler.placement.snapshot import Reservation, repairs, reserved
from tests.unit.scheduler.build import (
    BASE,
    DEMO,
    NOW_MS,
    OTHER,
    ROOMY,
    SOURCE,
    assignment,
    host,
    planned,
    record,
    snapshot,
    source,
    spec,
    status,
)

ONE_PLACE = Capacity(vcpus=8, memory_mib=8192, disk_mib=8192, sandboxes=1)


def test_an_assignment_is_complete() -> None:
    """The order holds all that the host needs: spec, resolved image, overhead, goal and generation."""
    wish, carrier = record(), host()
    (made,) = planned(snapshot(records=[wish], hosts=[carrier]), NOW_MS).assignments
    assert made == assignment(wish, carrier, image_digest=BASE)


def test_the_oldest_goes_first() -> None:
    """With one place left, the sandbox that was created first has it; the other is refused."""
    old, young = record(2, created_at_ms=1), record(1, created_at_ms=2)
    made = planned(snapshot(records=[young, old], hosts=[host(capacity=ONE_PLACE)]), NOW_MS)
    assert [one.sandbox_id for one in made.assignments] == [old.sandbox_id]
    assert [one.sandbox_id for one in made.refusals] == [young.sandbox_id]


def test_one_that_fits_nowhere_holds_nobody_up() -> None:
    """A sandbox larger than every host stays pending, and those behind it are placed."""
    huge = record(0, spec=spec(0, resources=Resources(vcpus=64, memory_mib=512, disk_mib=1024)))
    made = planned(snapshot(records=[huge, record(1)], hosts=[host()]), NOW_MS)
    assert [one.sandbox_id for one in made.assignments] == [record(1).sandbox_id]
    assert [one.sandbox_id for one in made.refusals] == [huge.sandbox_id]


def test_a_host_that_holds_the_sources_is_preferred() -> None:
    """Locality comes before fit: the bytes need not move. Another tenant's copy does not count."""
    wish = record(spec=spec(sources=(source(),)))
    near, full = host("near"), host("full", capacity=replace(ROOMY, memory_mib=1024))
    held = {(DEMO, SOURCE): frozenset([near.host_id]), (OTHER, SOURCE): frozenset([full.host_id])}
    (made,) = planned(snapshot(records=[wish], hosts=[full, near], sources=held), NOW_MS).assignments
    assert made.host_id == near.host_id


def test_the_best_fit_is_chosen_then_the_first_by_id() -> None:
    """Small sandboxes fill small gaps, so that room for large ones stays; equals are decided by id."""
    tight = host("tight", capacity=Capacity(vcpus=1, memory_mib=1024, disk_mib=1024, sandboxes=1))
    (made,) = planned(snapshot(records=[record()], hosts=[host("wide"), tight]), NOW_MS).assignments
    assert made.host_id == tight.host_id
    (made,) = planned(snapshot(records=[record()], hosts=[host("b"), host("a")]), NOW_MS).assignments
    assert made.host_id == "a"


@pytest.mark.parametrize(
    "boast",
    [
        {"capacity": Capacity(2**32 - 1, 2**64 - 1, 2**64 - 1, 2**32 - 1)},
        {"capacity": Capacity(2**32 - 1, 1, 1, 1), "vcpu_overcommit_milli": 2**32 - 1},
        {"numa_nodes": (NumaNode(0, 2**32 - 1, 2**64 - 1), NumaNode(1, 1, 2**64 - 1))},
        {"gpus": (Gpu("0", "boast", 2**64 - 1, 2**31 - 1, "s", True),)},
    ],
)
def test_what_a_host_boasts_of_stops_no_plan(boast: dict[str, Any]) -> None:
    """A host under an attacker's hand may register any number that the wire carries: sandboxes are placed all the same."""
    hosts = [host("boaster", **boast), host("honest")]
    wishes = [record(number) for number in range(3)]
    assert len(planned(snapshot(records=wishes, hosts=hosts), NOW_MS).assignments) == 3


def test_what_is_not_pending_is_left_alone() -> None:
    """Assigned, stopped and unreadable sandboxes are neither placed nor refused."""
    placed, stopped, opaque = record(0), record(1, goal=Goal.STOP), record(2)
    seen = snapshot(
        records=[placed, stopped, opaque],
        assignments=[assignment(placed, host())],
        hosts=[host()],
        opaque_sandboxes=frozenset([opaque.sandbox_id]),
    )
    made = planned(seen, NOW_MS)
    assert (made.assignments, made.refusals) == ((), ())


def test_a_host_with_an_unreadable_order_takes_nothing() -> None:
    """How much such an order has set aside is unknown, so nothing is added to it, and its reservation is left alone."""
    carrier = host()
    seen = snapshot(records=[record()], hosts=[carrier], opaque_hosts=frozenset([carrier.host_id]))
    (refusal,) = planned(seen, NOW_MS).refusals
    assert [reason.code for reason in refusal.reasons] == ["readable"]
    stored = {carrier.host_id: Reservation(carrier.host_id, 1, 1, 1, 1)}
    assert repairs(replace(seen, reservations=stored)) == ()


def test_released_sandboxes_set_nothing_aside() -> None:
    """Once its host has released a sandbox its room is free, though output and artifact stay."""
    wish, carrier = record(), host(capacity=ONE_PLACE)
    order = assignment(wish, carrier)
    running = snapshot(records=[wish, record(1)], assignments=[order], hosts=[carrier], statuses=[status(order)])
    assert reserved(running)[carrier.host_id] == Reservation(carrier.host_id, 1, 712, 1024, 1)
    assert planned(running, NOW_MS).assignments == ()
    over = status(order, Phase.COMPLETED, released=True)
    released = replace(running, statuses={(carrier.host_id, wish.sandbox_id): over})
    assert [one.sandbox_id for one in planned(released, NOW_MS).assignments] == [record(1).sandbox_id]


def stopped(carrier: HostRecord, wish: SandboxRecord, run: int = 1) -> tuple[Assignment, SandboxStatus]:
    """An order whose sandbox was stopped and released, with what its host says of it."""
    order = assignment(wish, carrier, goal=Goal.STOP, generation=2, run=run)
    return order, status(order, Phase.STOPPED, released=True)


def test_a_stopped_sandbox_keeps_its_disk_and_its_place() -> None:
    """Its vCPUs and memory are free for others, its disk and its place are not; once it is ordered to run again, all is set
    aside, whatever its host still says of the run before."""
    carrier = host()
    order, said = stopped(carrier, record())
    seen = snapshot(records=[record()], assignments=[order], statuses=[said], hosts=[carrier])
    assert reserved(seen)[carrier.host_id] == Reservation(carrier.host_id, 0, 0, 1024, 1)
    again = replace(seen, assignments={order.sandbox_id: replace(order, goal=Goal.RUN, generation=3, run=2)})
    assert reserved(again)[carrier.host_id] == Reservation(carrier.host_id, 1, 712, 1024, 1)


def test_a_started_sandbox_goes_back_to_its_host() -> None:
    """On a host that is full but for what the sandbox left behind, and beside a roomier one, the next run is placed on its own;
    the order carries run, generation and the image that the disk lies on."""
    carrier = host("own", capacity=Capacity(vcpus=1, memory_mib=712, disk_mib=1024, sandboxes=1))
    order, said = stopped(carrier, record())
    wish = record(generation=3, run=2)
    seen = snapshot(records=[wish], assignments=[order], statuses=[said], hosts=[carrier, host("roomy")])
    (made,) = planned(seen, NOW_MS + 5).assignments
    assert made == replace(order, goal=Goal.RUN, generation=3, run=2, assigned_at_ms=NOW_MS + 5)


MOVED_TAG = (HostImage("base:latest", Digest("sha256:" + "c" * 64)), HostImage("base:before", BASE))


@pytest.mark.parametrize(
    ("changes", "parts", "code"),
    [
        ({"capacity": replace(ROOMY, vcpus=0)}, {}, "vcpu_too_large"),
        ({"capacity": replace(ROOMY, memory_mib=711)}, {}, "memory_too_large"),
        ({}, {"alive": frozenset([HostId("roomy")])}, "alive"),
        ({"images": ()}, {}, "image_unknown"),
        ({"images": MOVED_TAG}, {}, ""),
        ({"images": (HostImage(UNTAGGED, BASE),)}, {}, ""),
        ({}, {"hosts": [host("roomy")]}, "host_unknown"),
    ],
)
def test_a_started_sandbox_waits_for_its_own_host(changes: dict[str, Any], parts: dict[str, Any], code: str) -> None:
    """Its refusal speaks of its own host alone, though another has room; the image counts by digest, whatever it is called now."""
    carrier = host("own", **changes)
    order, said = stopped(carrier, record())
    seen = snapshot(
        records=[record(generation=3, run=2)],
        assignments=[order],
        statuses=[said],
        **{"hosts": [carrier, host("roomy")], **parts},
    )
    made = planned(seen, NOW_MS)
    assert [one.host_id for one in made.assignments] == ([] if code else ["own"])
    assert [reason.code for refusal in made.refusals for reason in refusal.reasons] == ([code] if code else [])


def test_two_started_sandboxes_share_what_is_left() -> None:
    """Each counts what it left behind for itself only: with vCPUs for one, the older has them."""
    carrier = host(capacity=replace(ROOMY, vcpus=1))
    orders, said = zip(*(stopped(carrier, record(number)) for number in (0, 1)), strict=True)
    wishes = [record(number, generation=3, run=2) for number in (0, 1)]
    made = planned(snapshot(records=wishes, assignments=orders, statuses=said, hosts=[carrier]), NOW_MS)
    assert [one.sandbox_id for one in made.assignments] == [record(0).sandbox_id]
    assert [one.reasons[0].message for one in made.refusals] == ["needs 1 vCPUs, at most 0 are free"]


def test_wrong_reservations_are_repaired() -> None:
    """Missing, too small, too large and left over: each becomes what the assignments say."""
    missing, wrong, idle = host("missing"), host("wrong"), host("idle")
    orders = [assignment(record(0), missing), assignment(record(1), wrong)]
    stored = {
        wrong.host_id: Reservation(wrong.host_id, 99, 99, 99, 99),
        idle.host_id: Reservation(idle.host_id, 1, 1, 1, 1),
    }
    seen = snapshot(
        records=[record(0), record(1)], assignments=orders, hosts=[missing, wrong, idle], reservations=stored
    )
    expected = (
        Reservation(idle.host_id),
        Reservation(missing.host_id, 1, 712, 1024, 1),
        Reservation(wrong.host_id, 1, 712, 1024, 1),
    )
    assert repairs(seen) == expected
    assert repairs(replace(seen, reservations={one.host_id: one for one in expected})) == ()


@pytest.mark.slow
def test_impossible_wishes_cost_a_plan_so_much_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that wants a hundred different impossible things gets its share of a plan; another's wish is met in the same."""
    monkeypatch.setattr("scheduler.placement.turns.LOOKS_MAX", 40)
    carriers = [host(f"host-{number}") for number in range(4)]
    greedy = [
        record(number, spec=spec(number, resources=Resources(1, 400_000 + number, 1024))) for number in range(100)
    ]
    # The youngest of all, and behind it the greedy tenant's only modest one.
    modest, own = record(200, tenant=OTHER), record(300)
    seen = snapshot(records=[*greedy, modest, own], hosts=carriers)
    placed, refused = set(), set()
    for seed in range(1, 400):
        made = planned(seen, seed=seed)
        assert len(made.refusals) <= 5
        assert modest.sandbox_id in {one.sandbox_id for one in made.assignments}
        placed |= {one.sandbox_id for one in made.assignments}
        refused |= {one.sandbox_id for one in made.refusals}
    assert placed == {modest.sandbox_id, own.sandbox_id}
    assert refused == {one.sandbox_id for one in greedy}
