"""What holds for every plan, whatever the fleet looks like."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.model.host import Accelerator, Capacity, HostImage, HostRecord, Reservation
from fleet.model.ids import NO_DIGEST, Digest, HostId
from fleet.model.sandbox import (
    Goal,
    ImageRef,
    Label,
    Network,
    NetworkMode,
    Phase,
    Resources,
    SandboxRecord,
    SandboxSpec,
)
from scheduler.commit import is_news
from scheduler.placement.snapshot import Snapshot, free_of, repairs, reserved, set_aside, share_of
from tests.unit.scheduler.build import (
    BASE,
    DEMO,
    NOW_MS,
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
from tests.unit.scheduler.oracle import Candidate, excluding_codes

# A property of plans takes seconds of a processor.
pytestmark = pytest.mark.slow

OTHER_DIGEST = Digest("sha256:" + "c" * 64)
LABELS = (Label("disk", "nvme"), Label("zone", "a"))

# Small numbers, so that hosts are full, nearly full, or one short of what is asked.
resources = st.builds(
    Resources,
    vcpus=st.integers(1, 4),
    memory_mib=st.sampled_from([256, 512, 1024]),
    disk_mib=st.sampled_from([64, 512]),
)
capacities = st.builds(
    Capacity,
    vcpus=st.integers(0, 8),
    memory_mib=st.integers(0, 4000),
    disk_mib=st.integers(0, 1500),
    sandboxes=st.integers(0, 4),
)


@st.composite
def hosts(draw: st.DrawFn) -> list[HostRecord]:
    """Zero to five hosts that differ in everything that filters look at."""
    return [
        host(
            f"host-{index}",
            capacity=draw(capacities),
            labels=tuple(label for label in LABELS if draw(st.booleans())),
            images=draw(
                st.sampled_from([(), (HostImage("base:latest", BASE),), (HostImage("base:latest", OTHER_DIGEST),)])
            ),
            accelerator=draw(st.sampled_from(Accelerator)),
            network_modes=draw(st.sampled_from([(NetworkMode.NONE,), (NetworkMode.NONE, NetworkMode.CLOSED)])),
        )
        for index in range(draw(st.integers(0, 5)))
    ]


@st.composite
def records(draw: st.DrawFn) -> list[SandboxRecord]:
    """Zero to twelve wishes, most of them to run."""
    made = []
    for number in range(draw(st.integers(0, 12))):
        wanted = spec(
            number,
            resources=draw(resources),
            image=ImageRef("base:latest", draw(st.sampled_from([NO_DIGEST, NO_DIGEST, BASE]))),
            network=Network(draw(st.sampled_from([NetworkMode.NONE, NetworkMode.CLOSED]))),
            require_labels=draw(st.sampled_from([(), (), LABELS[:1], LABELS])),
            sources=draw(st.sampled_from([(), (source(),)])),
        )
        goal = draw(st.sampled_from([Goal.RUN, Goal.RUN, Goal.RUN, Goal.STOP]))
        created_at_ms = NOW_MS + draw(st.integers(0, 3))
        made.append(record(number, spec=wanted, goal=goal, created_at_ms=created_at_ms))
    return made


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """A fleet with some sandboxes placed already, some of these over or to run again, and no reservation to be trusted."""
    wishes, carriers = draw(records()), draw(hosts())
    placed = [
        assignment(wish, draw(st.sampled_from(carriers)), image_digest=draw(st.sampled_from([BASE, OTHER_DIGEST])))
        for wish in wishes
        if carriers and draw(st.integers(0, 2)) == 0
    ]
    phases = st.sampled_from([Phase.RUNNING, Phase.COMPLETED, Phase.STOPPED, Phase.STOPPED])
    statuses = [status(order, draw(phases), released=draw(st.booleans())) for order in placed if draw(st.booleans())]
    # Some of the placed are wanted for a further run.
    runs = {order.sandbox_id: 2 for order in placed if draw(st.booleans())}
    wishes = [replace(wish, run=runs.get(wish.sandbox_id, 1)) for wish in wishes]
    ids = [one.host_id for one in carriers]
    some_hosts = st.frozensets(st.sampled_from(ids)) if ids else st.just(frozenset[HostId]())
    wrong = st.builds(Reservation, st.just(HostId("")), st.integers(0, 9), st.integers(0, 9999))
    return snapshot(
        records=wishes,
        assignments=placed,
        statuses=statuses,
        hosts=carriers,
        alive=draw(some_hosts) | draw(some_hosts),
        sources={(DEMO, SOURCE): draw(some_hosts)},
        reservations={host_id: replace(draw(wrong), host_id=host_id) for host_id in draw(some_hosts)},
        opaque_hosts=draw(some_hosts) if draw(st.integers(0, 4)) == 0 else frozenset(),
    )


def apply(seen: Snapshot) -> Snapshot:
    """The snapshot after its plan was committed."""
    made = planned(seen, NOW_MS)
    assignments = {**seen.assignments, **{one.sandbox_id: one for one in made.assignments}}
    return replace(seen, assignments=assignments, refusals={one.sandbox_id: one for one in made.refusals})


def candidates(seen: Snapshot) -> list[Candidate]:
    """The hosts as they are left by the snapshot's assignments."""
    sums = reserved(seen)
    return [
        Candidate(
            carrier,
            free_of(carrier.capacity, sums.get(host_id, Reservation(host_id))),
            is_alive=host_id in seen.alive,
            is_readable=host_id not in seen.opaque_hosts,
        )
        for host_id, carrier in seen.hosts.items()
    ]


@given(snapshots())
def test_a_plan_never_overcommits(seen: Snapshot) -> None:
    """No host that a plan adds to has less than nothing left of anything afterwards."""
    chosen = {one.host_id for one in planned(seen, NOW_MS).assignments}
    for one in candidates(apply(seen)):
        if one.record.host_id in chosen:
            assert min(one.free.vcpus, one.free.memory_mib, one.free.disk_mib, one.free.sandboxes) >= 0


def looks_for(seen: Snapshot, wish: SandboxRecord) -> SandboxSpec:
    """What a wish looks for: a further run, the very image that its disk lies on."""
    known = seen.assignments.get(wish.sandbox_id)
    return wish.spec if known is None else replace(wish.spec, image=ImageRef("", known.image_digest))


def freed(own: Reservation, carrier: Candidate) -> Candidate:
    """`carrier` as if `own` were not set aside on it."""
    back = Reservation(own.host_id, -own.vcpus, -own.memory_mib, -own.disk_mib, -own.sandboxes)
    return replace(carrier, free=free_of(carrier.free, back))


@given(snapshots())
def test_every_placement_passes_every_filter(seen: Snapshot) -> None:
    """A sandbox lands only where, counting all that was placed with it, nothing excludes it."""
    made = planned(seen, NOW_MS)
    after = {one.record.host_id: one for one in candidates(apply(seen))}
    for order in made.assignments:
        landed = after[order.host_id]
        wanted = looks_for(seen, seen.records[order.sandbox_id])
        assert excluding_codes(wanted, freed(share_of(order), landed)) == []
        assert order.image_digest in [image.digest for image in landed.record.images]


@given(snapshots())
def test_a_further_run_never_moves(seen: Snapshot) -> None:
    """A sandbox that has a host runs again there or nowhere, on the image it had, and its order names the wished run."""
    for order in planned(seen, NOW_MS).assignments:
        known, wish = seen.assignments.get(order.sandbox_id), seen.records[order.sandbox_id]
        assert (order.run, order.generation, order.goal) == (wish.run, wish.generation, Goal.RUN)
        if known is not None:
            assert (order.host_id, order.image_digest) == (known.host_id, known.image_digest)
            assert order.run > known.run


@given(snapshots())
def test_a_refusal_is_necessary(seen: Snapshot) -> None:
    """Whatever a plan refuses, no host can carry, and for a further run its own cannot; each host is counted once."""
    left = {one.record.host_id: one for one in candidates(apply(seen))}
    for refusal in planned(seen, NOW_MS).refusals:
        wish = seen.records[refusal.sandbox_id]
        known = seen.assignments.get(wish.sandbox_id)
        able = list(left.values())
        if known is not None:
            held = set_aside(known, seen.status_of(known))
            able = [freed(held, left[known.host_id])]
        assert all(excluding_codes(looks_for(seen, wish), one) for one in able)
        assert refusal.hosts_considered == len(able) == sum(reason.hosts for reason in refusal.reasons)


@given(snapshots())
def test_every_pending_sandbox_is_placed_or_refused(seen: Snapshot) -> None:
    """A plan leaves nobody without an answer, and answers nobody twice."""
    made = planned(seen, NOW_MS)
    answered = [one.sandbox_id for one in (*made.assignments, *made.refusals)]
    assert sorted(answered) == sorted(one.sandbox_id for one in seen.pending())


@given(snapshots(), st.randoms(use_true_random=False))
def test_the_same_snapshot_gives_the_same_plan(seen: Snapshot, chance: random.Random) -> None:
    """A decision can be recomputed: the order in which the store was read plays no part."""
    shuffled = {
        name: dict(chance.sample(list(getattr(seen, name).items()), len(getattr(seen, name))))
        for name in ("records", "assignments", "statuses", "hosts", "sources")
    }
    assert planned(replace(seen, **shuffled), NOW_MS) == planned(seen, NOW_MS)


@given(snapshots())
def test_planning_again_changes_nothing(seen: Snapshot) -> None:
    """Once a plan is carried out, the next one has nothing to place and nothing new to say."""
    after = apply(seen)
    again = planned(after, NOW_MS + 1000)
    assert again.assignments == ()
    assert {one.sandbox_id for one in again.refusals} == set(after.refusals)
    assert not any(is_news(refusal, after.refusals[refusal.sandbox_id]) for refusal in again.refusals)


@given(snapshots())
def test_repairs_converge(seen: Snapshot) -> None:
    """Once the repairs are written there are none, and every readable host's reservation is the sum of its assignments."""
    stored = {**seen.reservations, **{one.host_id: one for one in repairs(seen)}}
    after = replace(seen, reservations=stored)
    assert repairs(after) == ()
    sums = reserved(after)
    for host_id in set(seen.hosts) - seen.opaque_hosts:
        nothing = Reservation(host_id)
        assert stored.get(host_id, nothing) == sums.get(host_id, nothing)
