"""Preemption: who ends so that one of a higher priority has room, who does not, and that the room is kept for it."""

from dataclasses import replace

import pytest

from fleet.model.assignment import Assignment, GpuShare
from fleet.model.host import Capacity, Gpu
from fleet.model.sandbox import (
    Agent,
    Goal,
    Phase,
    Placement,
    Reason,
    Resources,
    Restart,
    SandboxRecord,
    Stage,
    StageName,
)
from scheduler.placement.evictions import PREEMPTED, Ending, Halt
from scheduler.placement.plan import Plan
from scheduler.placement.preemption import PREEMPTING
from scheduler.placement.snapshot import Snapshot
from tests.unit.scheduler.build import (
    NOW_MS,
    OTHER,
    assignment,
    host,
    planned,
    record,
    sandbox_id,
    snapshot,
    spec,
    status,
)

TIGHT = Capacity(vcpus=4, memory_mib=8192, disk_mib=16_384, sandboxes=8)


def wish(number: int, priority: int = 0, vcpus: int = 1, *, restarts: bool = True, **changes: object) -> SandboxRecord:
    restart = Restart.ALWAYS if restarts else Restart.NO
    agent = Agent("worker", "custom", ("true",), memory_mib=256, restart=restart)
    wanted = spec(number, agents=(agent,), placement=Placement(priority), resources=Resources(vcpus, 512, 1024))
    return record(number, spec=wanted, **changes)


def full(runs: list[SandboxRecord], waits: list[SandboxRecord], *, begun: bool = True, hosts: int = 1) -> Snapshot:
    """Everything in `runs` runs, spread over the hosts in turns."""
    carriers = [host(f"host-{number}", capacity=TIGHT) for number in range(hosts)]
    orders = [
        assignment(one, carriers[index % hosts], assigned_at_ms=NOW_MS - 1000 * one.spec.resources.vcpus)
        for index, one in enumerate(runs)
    ]
    statuses = [status(one, Phase.RUNNING) for one in orders] if begun else []
    return snapshot(records=[*runs, *waits], assignments=orders, statuses=statuses, hosts=carriers)


def ended(made: Plan) -> list[str]:
    return [one.assignment.sandbox_id for one in made.evictions]


def moved(seen: Snapshot, made: Plan) -> Snapshot:
    """After the evictions are written: the orders say stop, and nothing has stopped yet."""
    halted = {one.assignment.sandbox_id: one.assignment for one in made.evictions}
    return replace(seen, assignments={**seen.assignments, **halted})


def test_what_costs_least_ends() -> None:
    """The lowest priority ends first, as few as it takes, and the one that waits reads how many end where."""
    runs = [wish(0, 3), wish(1, 1), wish(2, 2), wish(3, 1)]
    made = planned(full(runs, [wish(9, 5)]))
    assert made.assignments == ()
    assert len(ended(made)) == 1
    assert ended(made)[0] in (sandbox_id(1), sandbox_id(3))
    (move,) = made.evictions
    assert isinstance(move, Halt)
    assert (move.assignment.goal, move.assignment.reason is not None and move.assignment.reason.code) == (
        Goal.STOP,
        PREEMPTED,
    )
    (refusal,) = made.refusals
    assert [one.code for one in refusal.reasons] == [PREEMPTING]
    assert refusal.reasons[0].message == "1 of lower priority ends on host host-0 to make room for it"


@pytest.mark.parametrize("priority", [0, 3])
def test_equals_and_betters_never_end(priority: int) -> None:
    """One of the same or a lower priority than all that runs waits like everybody."""
    made = planned(full([wish(number, 3) for number in range(4)], [wish(9, priority)]))
    assert made.evictions == ()
    assert [one.code for one in made.refusals[0].reasons] == ["vcpu"]


def test_no_more_end_than_the_room_takes() -> None:
    """Three vCPUs of one victim are enough: the small ones, which alone would not do, run on."""
    made = planned(full([wish(0, 1, vcpus=3), wish(1, 0)], [wish(9, 5, vcpus=3)]))
    assert ended(made) == [sandbox_id(0)]


def test_those_that_go_on_elsewhere_end_first() -> None:
    """Of two hosts with equal priorities it is the one whose victim restarts; what does not would be lost for good."""
    runs = [wish(0, 1, vcpus=4, restarts=False), wish(1, 1, vcpus=4)]
    seen = full(runs, [wish(9, 5, vcpus=4)], hosts=2)
    started = (Stage(StageName.DOMAIN_STARTED, NOW_MS),)
    begun = {key: replace(one, stages=started) for key, one in seen.statuses.items()}
    made = planned(replace(seen, statuses=begun))
    assert ended(made) == [sandbox_id(1)]
    assert isinstance(made.evictions[0], Halt)


def test_nobody_ends_in_vain() -> None:
    """Where all of lower priority together would not make room, none of them ends."""
    made = planned(full([wish(0, 1), wish(1, 9, vcpus=3)], [wish(9, 5, vcpus=2)]))
    assert made.evictions == ()


def test_room_that_is_becoming_free_is_waited_for() -> None:
    """While its victim stops no further one ends, and what is free until then is nobody else's; then it is placed."""
    runs = [wish(0, 1, vcpus=3)]
    seen = full(runs, [wish(9, 5, vcpus=4), wish(8, 0, vcpus=1)])
    first = planned(seen)
    assert ended(first) == [sandbox_id(0)]
    assert first.assignments == ()
    second = planned(moved(seen, first))
    assert (second.evictions, second.assignments) == ((), ())
    told = {one.sandbox_id: one.reasons[0] for one in second.refusals}
    assert told[sandbox_id(9)].code == PREEMPTING
    assert told[sandbox_id(9)].message == "waits for 1 to leave host host-0, where its room is held"
    free = replace(
        seen, assignments={}, statuses={}, records={**seen.records, sandbox_id(0): replace(runs[0], placement=2)}
    )
    assert [one.sandbox_id for one in planned(free).assignments] == [sandbox_id(9)]


@pytest.mark.slow
def test_a_promise_is_kept_among_many_hosts() -> None:
    """However many hosts are looked at in other turns each time: while its victim stops, nobody else ends for it."""
    seen = full([wish(number, 0, vcpus=4) for number in range(100)], [wish(900, 5, vcpus=4)], hosts=100)
    first = planned(seen, seed=1)
    assert len(ended(first)) == 1
    later = replace(moved(seen, first), refusals={one.sandbox_id: one for one in first.refusals})
    for seed in range(2, 30):
        again = planned(later, seed=seed)
        assert again.evictions == ()
        assert again.refusals[0].host_id == first.refusals[0].host_id


def test_what_was_preempted_preempts_nobody() -> None:
    """One that ended for another waits, though something of a still lower priority runs: no chain comes about."""
    waits = wish(9, 5, placement=2, reason=Reason(PREEMPTED, "a sandbox of priority 7 needs its room"))
    made = planned(full([wish(number, 0) for number in range(4)], [waits]))
    assert made.evictions == ()


def test_two_that_preempt_do_not_count_on_the_same_room() -> None:
    """Each makes room on a host of its own."""
    seen = full([wish(number, 0, vcpus=4) for number in range(2)], [wish(8, 5, vcpus=4), wish(9, 5, vcpus=4)], hosts=2)
    made = planned(seen)
    assert sorted(ended(made)) == [sandbox_id(0), sandbox_id(1)]
    again = planned(moved(seen, made))
    assert again.evictions == ()
    assert [one.reasons[0].code for one in again.refusals] == [PREEMPTING] * 2


def test_a_stopped_victim_keeps_its_disk() -> None:
    """One that cannot go on elsewhere frees vCPUs and memory, but no disk: it does not end for the sake of that."""
    small = Capacity(vcpus=8, memory_mib=8192, disk_mib=1024, sandboxes=8)
    runs, carrier = wish(0, 0, restarts=False), host(capacity=small)
    order = assignment(runs, carrier, run=2, first_run=1)
    seen = snapshot(
        records=[replace(runs, run=2), wish(9, 5)],
        assignments=[order],
        statuses=[status(order, Phase.RUNNING)],
        hosts=[carrier],
    )
    assert planned(seen).evictions == ()
    lean = replace(seen, hosts={carrier.host_id: replace(carrier, capacity=Capacity(1, 8192, 9999, 8))})
    (move,) = planned(lean).evictions
    assert isinstance(move, Ending)


def test_others_names_are_not_told() -> None:
    """Whoever ends for another tenant's sandbox reads its priority, and not its name."""
    order: Assignment = (
        planned(full([wish(0, 0, vcpus=4)], [wish(9, 5, vcpus=4, tenant=OTHER)])).evictions[0].assignment
    )
    assert order.reason is not None
    assert "box-9" not in order.reason.message
    assert "priority 5" in order.reason.message


def test_a_device_is_made_free_and_held() -> None:
    """Of two devices that of the lower priority becomes free; its parts that are free already are nobody else's until then."""
    devices = tuple(Gpu(f"gpu-{number}", "A100", 40_960, is_shareable=True) for number in range(2))
    carrier = host(capacity=Capacity(16, 16_384, 65_536, 16), gpus=devices)
    agents = wish(0).spec.agents

    def with_gpu(number: int, priority: int, milli: int) -> SandboxRecord:
        asked = Resources(1, 512, 1024, gpus=1, gpu_milli=milli)
        return record(number, spec=spec(number, agents=agents, placement=Placement(priority), resources=asked))

    runs = [with_gpu(0, 9, 1000), with_gpu(1, 0, 500)]
    orders = [
        assignment(one, carrier, gpus=(GpuShare(devices[index].device_id, one.spec.resources.gpu_milli),))
        for index, one in enumerate(runs)
    ]
    seen = snapshot(
        records=[*runs, with_gpu(8, 5, 1000), with_gpu(9, 0, 500)],
        assignments=orders,
        statuses=[status(one) for one in orders],
        hosts=[carrier],
    )
    made = planned(seen)
    assert ended(made) == [sandbox_id(1)]
    assert made.assignments == ()
    assert {one.sandbox_id: one.reasons[0].code for one in made.refusals} == {
        sandbox_id(8): PREEMPTING,
        sandbox_id(9): "gpu",
    }
    free = replace(
        seen,
        assignments={sandbox_id(0): orders[0]},
        records={**seen.records, sandbox_id(1): replace(runs[1], placement=2)},
    )
    (order,) = planned(free).assignments
    assert (order.sandbox_id, order.gpus) == (sandbox_id(8), (GpuShare("gpu-1", 1000),))
