"""Which sandboxes leave their host, and which end with it."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.model.assignment import Refusal, RefusalReason
from fleet.model.host import HostCordon, HostLosses
from fleet.model.ids import HostId
from fleet.model.sandbox import Agent, Goal, Phase, Reason, Restart, Stage, StageName
from scheduler.placement.drains import describe_drain
from scheduler.placement.evictions import (
    BACKOFF_MS,
    BACKOFF_MS_MAX,
    FENCE_WAIT_S,
    FORGET_MS,
    LOSS_S,
    LOSSES_KEPT,
    Absence,
    Ending,
    Eviction,
    Halt,
    Loss,
    backoff_ms,
    due_moves,
    find_absent,
    halt,
)
from scheduler.placement.lifecycle import Dismissal, Order, due_changes
from tests.unit.scheduler.build import DEMO, NOW_MS, assignment, host, planned, record, snapshot, spec, status

ONE, TWO = HostId("one"), HostId("two")
FENCED = host("one", is_fenced=True)
RESTARTS = spec(agents=(Agent("worker", "custom", ("true",), restart=Restart.ON_FAILURE, memory_mib=256),))
BEGUN = (Stage(StageName.DOMAIN_STARTED, 1),)
LONG_AGO, NOW_S = 0.0, 1000.0

WISH = record()
ORDER = assignment(WISH, FENCED, first_run=1)
AGAIN = record(spec=RESTARTS)
AGAIN_ORDER = assignment(AGAIN, FENCED, first_run=1)
FENCED_REASON = Reason("host_fenced", "…")


def outline(moves: Any) -> list[tuple[str, ...]]:
    """What kind each move is, with the reason's code and what record and order come to."""
    found = []
    for move in moves:
        match move:
            case Eviction():
                found.append(("evict", move.reason.code, f"placement {move.record.placement}", move.assignment.goal))
            case Ending():
                assert move.record.reason is not None
                found.append(("end", move.record.reason.code, move.record.goal))
            case Halt():
                assert move.assignment.reason is not None
                found.append(("halt", move.assignment.reason.code, move.assignment.goal))
            case Loss():
                continue
    return found


EVICTED = ("evict", "host_lost", "placement 2", "remove")
ENDED = ("end", "host_lost", "stop")

LOST: list[tuple[str, dict[str, Any], list[Any]]] = [
    ("had not begun", {"records": [WISH], "assignments": [ORDER]}, [EVICTED]),
    (
        "its host had not said that it began",
        {"records": [WISH], "assignments": [ORDER], "statuses": [status(ORDER, Phase.STARTING)]},
        [EVICTED],
    ),
    (
        "had begun",
        {"records": [WISH], "assignments": [ORDER], "statuses": [status(ORDER, stages=BEGUN)]},
        [ENDED],
    ),
    (
        "restarts",
        {"records": [AGAIN], "assignments": [AGAIN_ORDER], "statuses": [status(AGAIN_ORDER, stages=BEGUN)]},
        [EVICTED],
    ),
    (
        "went on with its disk",
        {"records": [replace(WISH, run=2)], "assignments": [replace(ORDER, run=2)]},
        [ENDED],
    ),
    (
        "waits to go on with its disk",
        {"records": [replace(AGAIN, run=2)], "assignments": [AGAIN_ORDER]},
        [],
    ),
    (
        "has completed",
        {"records": [AGAIN], "assignments": [AGAIN_ORDER], "statuses": [status(AGAIN_ORDER, Phase.COMPLETED)]},
        [],
    ),
    (
        "was ended by its fence, and restarts",
        {
            "records": [AGAIN],
            "assignments": [AGAIN_ORDER],
            "statuses": [status(AGAIN_ORDER, Phase.FAILED, reason=FENCED_REASON, stages=BEGUN)],
        },
        [EVICTED],
    ),
    (
        "was ended by its fence, and does not restart",
        {
            "records": [WISH],
            "assignments": [ORDER],
            "statuses": [status(ORDER, Phase.FAILED, reason=FENCED_REASON, stages=BEGUN)],
        },
        [],
    ),
    ("is to stop", {"records": [replace(WISH, goal=Goal.STOP, generation=2)], "assignments": [ORDER]}, []),
    ("is to go", {"records": [replace(WISH, goal=Goal.REMOVE, generation=2)], "assignments": [ORDER]}, []),
    (
        "has gone on elsewhere",
        {
            "records": [replace(WISH, placement=2)],
            "assignments": [assignment(WISH, host("two"), placement=2)],
            "remnants": {(ONE, WISH.sandbox_id): replace(ORDER, goal=Goal.REMOVE)},
        },
        [],
    ),
    ("nobody's order", {"assignments": [ORDER]}, []),
    (
        "cannot be read",
        {"records": [WISH], "assignments": [ORDER], "opaque_sandboxes": frozenset([WISH.sandbox_id])},
        [],
    ),
    (
        "keeps what it has",
        {"records": [WISH], "assignments": [ORDER], "hosts": [host("one"), host("two")]},
        [],
    ),
]


@pytest.mark.parametrize(("parts", "expected"), [case[1:] for case in LOST], ids=[case[0] for case in LOST])
def test_a_lost_host(parts: dict[str, Any], expected: list[Any]) -> None:
    """What restarts or never began goes elsewhere; what began ends; what is over, or another's wish, stays."""
    parts = {"hosts": [FENCED, host("two")], "alive": frozenset([TWO]), **parts}
    absent = {ONE: Absence(7, LONG_AGO)}
    moves = due_moves(snapshot(**parts), absent, now_s=NOW_S, now_ms=NOW_MS)
    assert outline(moves) == expected
    assert all(move.absence == absent[ONE] for move in moves if isinstance(move, Eviction | Ending))


@pytest.mark.parametrize(("waited_s", "is_due"), [(FENCE_WAIT_S - 0.1, False), (FENCE_WAIT_S, True)])
def test_a_lost_host_has_its_time(waited_s: float, is_due: bool) -> None:
    """Nothing moves before the fence has surely fallen."""
    parts = snapshot(records=[WISH], assignments=[ORDER], hosts=[FENCED], alive=frozenset())
    moves = due_moves(parts, {ONE: Absence(7, NOW_S - waited_s)}, now_s=NOW_S, now_ms=NOW_MS)
    assert outline(moves) == ([EVICTED] if is_due else [])


def test_an_absence_is_one_of_a_registration() -> None:
    """A host that came back unseen and went again has all of its time again; one that is back is absent no more."""
    away = snapshot(hosts=[FENCED, host("two")], alive=frozenset([TWO]))
    first = find_absent(away, {}, lambda _id: 7, 10.0)
    assert first == {ONE: Absence(7, 10.0)}
    assert find_absent(away, first, lambda _id: 7, 20.0) == first
    assert find_absent(away, first, lambda _id: 8, 20.0) == {ONE: Absence(8, 20.0)}
    assert find_absent(replace(away, alive=frozenset([ONE, TWO])), first, lambda _id: 7, 30.0) == {}


def test_an_eviction_is_a_generation_and_keeps_the_run() -> None:
    """The same identity and run; the old order goes, and says why."""
    wish = replace(WISH, run=1, generation=3, not_before_ms=5)
    parts = snapshot(records=[wish], assignments=[replace(ORDER, generation=3)], hosts=[FENCED], alive=frozenset())
    (move,) = [
        one
        for one in due_moves(parts, {ONE: Absence(7, LONG_AGO)}, now_s=NOW_S, now_ms=NOW_MS)
        if isinstance(one, Eviction)
    ]
    assert move.record == replace(wish, placement=2, generation=4, reason=move.reason)
    assert move.assignment == replace(ORDER, goal=Goal.REMOVE, generation=4, reason=move.reason)


@pytest.mark.parametrize(("placement", "waits_ms"), [(1, 0), (2, 0), (3, BACKOFF_MS), (4, 2 * BACKOFF_MS)])
def test_what_loses_its_hosts_waits_longer_each_time(placement: int, waits_ms: int) -> None:
    """A sandbox that kills its hosts does not go through the fleet in minutes."""
    wish = replace(WISH, placement=placement)
    order = replace(ORDER, placement=placement)
    parts = snapshot(records=[wish], assignments=[order], hosts=[FENCED], alive=frozenset())
    (move,) = [
        one
        for one in due_moves(parts, {ONE: Absence(7, LONG_AGO)}, now_s=NOW_S, now_ms=NOW_MS)
        if isinstance(one, Eviction)
    ]
    assert move.record.not_before_ms == (NOW_MS + waits_ms if waits_ms else 0)


SAID: list[tuple[str, Any, Any, list[Any]]] = [
    (
        "fenced, restarts",
        AGAIN_ORDER,
        {"phase": Phase.FAILED, "reason": FENCED_REASON, "released": True, "stages": BEGUN},
        [("evict", "host_fenced", "placement 2", "remove")],
    ),
    (
        "ended by a boot, restarts",
        AGAIN_ORDER,
        {"phase": Phase.FAILED, "reason": Reason("host_restarted", "…"), "released": True, "stages": BEGUN},
        [("evict", "host_restarted", "placement 2", "remove")],
    ),
    (
        "fenced, not released yet",
        AGAIN_ORDER,
        {"phase": Phase.FAILED, "reason": FENCED_REASON, "released": False},
        [],
    ),
    ("failed by itself", AGAIN_ORDER, {"phase": Phase.FAILED, "reason": Reason("vm_died", "…"), "released": True}, []),
    (
        "halted, and stopped",
        replace(AGAIN_ORDER, goal=Goal.STOP, generation=2, reason=Reason("preempted", "…")),
        {"phase": Phase.STOPPED, "released": True},
        [("evict", "preempted", "placement 2", "remove")],
    ),
    (
        "halted, and still stopping",
        replace(AGAIN_ORDER, goal=Goal.STOP, generation=2, reason=Reason("preempted", "…")),
        {"phase": Phase.RUNNING},
        [],
    ),
    (
        "halted, but it had ended by itself",
        replace(AGAIN_ORDER, goal=Goal.STOP, generation=2, reason=Reason("preempted", "…")),
        {"phase": Phase.COMPLETED, "released": True},
        [],
    ),
]


@pytest.mark.parametrize(("order", "said", "expected"), [case[1:] for case in SAID], ids=[case[0] for case in SAID])
def test_what_its_host_has_said(order: Any, said: dict[str, Any], expected: list[Any]) -> None:
    """A host that is there is believed: it has let go of the VM before another gets it."""
    parts = snapshot(records=[AGAIN], assignments=[order], statuses=[status(order, **said)], hosts=[FENCED])
    moves = due_moves(parts, {}, now_s=NOW_S, now_ms=NOW_MS)
    assert outline(moves) == expected
    assert due_changes(parts) == ()


def make_drain(count: int, *, moves_max: int = 1, is_forced: bool = False, begun: frozenset[int] = frozenset()) -> Any:
    wishes = [
        record(number, spec=spec(number, agents=(WISH if number in begun else AGAIN).spec.agents))
        for number in range(count)
    ]
    orders = [assignment(wish, FENCED, first_run=1) for wish in wishes]
    cordon = HostCordon(ONE, "ops", 1, is_draining=True, moves_max=moves_max, is_forced=is_forced)
    return snapshot(
        records=wishes,
        assignments=orders,
        statuses=[status(order, stages=BEGUN) for order in orders],
        hosts=[FENCED],
        cordons={ONE: cordon},
    )


@pytest.mark.parametrize(("moves_max", "halted"), [(0, 1), (1, 1), (2, 2), (9, 3)])
def test_a_drain_moves_so_many_at_a_time(moves_max: int, halted: int) -> None:
    """The oldest first; one that was halted, or waits for room elsewhere, counts until it has a host."""
    parts = make_drain(3, moves_max=moves_max)
    halts = due_moves(parts, {}, now_s=NOW_S, now_ms=NOW_MS)
    assert outline(halts) == [("halt", "host_drained", "stop")] * halted
    first = halts[0]
    assert isinstance(first, Halt)
    assert first.assignment.sandbox_id == record(0).sandbox_id
    stopping = replace(parts, assignments={**parts.assignments, first.assignment.sandbox_id: first.assignment})
    left = due_moves(stopping, {}, now_s=NOW_S, now_ms=NOW_MS)
    assert len(left) == min(2, max(0, max(1, moves_max) - 1))
    wish = replace(parts.records[record(0).sandbox_id], placement=2, generation=2)
    gone = replace(first.assignment, goal=Goal.REMOVE)
    pending = replace(
        parts,
        records={**parts.records, wish.sandbox_id: wish},
        assignments={**parts.assignments, wish.sandbox_id: gone},
    )
    assert len(due_moves(pending, {}, now_s=NOW_S, now_ms=NOW_MS)) == len(left)


@pytest.mark.parametrize("is_forced", [False, True])
def test_what_cannot_run_on_elsewhere_is_waited_for_unless_forced(is_forced: bool) -> None:
    """It holds up nobody else, and takes no place among those that move."""
    parts = make_drain(2, is_forced=is_forced, begun=frozenset({0}))
    ended = [("end", "host_drained", "stop")] if is_forced else []
    assert outline(due_moves(parts, {}, now_s=NOW_S, now_ms=NOW_MS)) == [*ended, ("halt", "host_drained", "stop")]


def test_a_drain_says_how_far_it_is_and_why() -> None:
    """What runs is left, what is halted or waits for room moves, what is over is not counted; each that stays has its reason."""
    parts = make_drain(5, begun=frozenset({0}))
    ids = [record(number).sandbox_id for number in range(5)]
    halted = replace(parts.assignments[ids[1]], goal=Goal.STOP, reason=Reason("host_drained", "…"))
    moved = replace(parts.records[ids[2]], placement=2)
    refusal = Refusal(ids[2], 2, (RefusalReason("memory", 2, "needs 9 MiB of memory, at most 1 are free"),), NOW_MS)
    over = status(parts.assignments[ids[3]], Phase.COMPLETED, released=True)
    parts = replace(
        parts,
        records={**parts.records, ids[2]: moved},
        assignments={**parts.assignments, ids[1]: halted},
        statuses={**parts.statuses, (ONE, ids[3]): over},
        refusals={ids[2]: refusal},
    )
    left, moving, stragglers = describe_drain(parts, ONE)
    assert (left, moving) == (2, 2)
    assert [(one.sandbox_id, one.code) for one in stragglers] == [(ids[0], "may_not_move"), (ids[2], "no_room")]
    assert "needs 9 MiB" in stragglers[1].message


def test_a_halted_sandbox_obeys_its_owner() -> None:
    """A stop or a removal that comes meanwhile is carried out, though the order's generation is ahead."""
    halted = replace(AGAIN_ORDER, goal=Goal.STOP, generation=2, reason=Reason("preempted", "…"))
    removed = replace(AGAIN, goal=Goal.REMOVE, generation=2)
    parts = snapshot(records=[removed], assignments=[halted], hosts=[FENCED])
    assert due_changes(parts) == (Order(replace(halted, goal=Goal.REMOVE, generation=3, reason=None)),)
    stopped = replace(AGAIN, goal=Goal.STOP, generation=2)
    parts = snapshot(
        records=[stopped],
        assignments=[halted],
        statuses=[status(halted, Phase.STOPPED, released=True)],
        hosts=[FENCED],
    )
    assert (due_changes(parts), due_moves(parts, {}, now_s=NOW_S, now_ms=NOW_MS)) == ((), ())


def test_only_what_runs_is_halted() -> None:
    """Preemption of what is over, or about to be, makes no room."""
    reason = Reason("preempted", "…")
    parts = snapshot(records=[AGAIN], assignments=[AGAIN_ORDER], hosts=[FENCED])
    assert outline([halt(parts, AGAIN.sandbox_id, reason)]) == [("halt", "preempted", "stop")]
    ended = replace(parts, statuses={(ONE, AGAIN.sandbox_id): status(AGAIN_ORDER, Phase.COMPLETED)})
    assert halt(ended, AGAIN.sandbox_id, reason) is None
    assert halt(snapshot(), AGAIN.sandbox_id, reason) is None


def test_what_is_left_of_earlier_placements_goes() -> None:
    """An order of an earlier placement is one to remove, and goes when its host is done; the newest is not touched."""
    wish = replace(WISH, placement=3, generation=3)
    newest = assignment(wish, host("two"), placement=3, first_run=1)
    old, older = replace(ORDER, placement=2), replace(ORDER, host_id=HostId("three"), placement=1, goal=Goal.REMOVE)
    parts = snapshot(
        records=[wish],
        assignments=[newest],
        remnants={(ONE, wish.sandbox_id): old, (HostId("three"), wish.sandbox_id): older},
        statuses=[status(older, Phase.REMOVED, released=True)],
        hosts=[FENCED, host("two"), host("three")],
    )
    assert due_changes(parts) == (Order(replace(old, goal=Goal.REMOVE, generation=2)), Dismissal(older))


def test_a_further_placement_is_elsewhere() -> None:
    """Not where something of the sandbox is left, however much room there is; its first run is the one it is at."""
    wish = replace(WISH, placement=2, generation=2, run=3)
    gone = replace(ORDER, goal=Goal.REMOVE, generation=2)
    parts = snapshot(records=[wish], assignments=[gone], hosts=[FENCED])
    (refusal,) = planned(parts, NOW_MS).refusals
    assert [reason.code for reason in refusal.reasons] == ["leaving"]
    parts = snapshot(records=[wish], assignments=[gone], hosts=[FENCED, host("two")])
    (placed,) = planned(parts, NOW_MS).assignments
    assert (placed.host_id, placed.placement, placed.run, placed.first_run) == (TWO, 2, 3, 3)
    assert planned(parts, NOW_MS - 1).assignments
    assert planned(
        replace(parts, records={wish.sandbox_id: replace(wish, not_before_ms=NOW_MS + 1)}), NOW_MS
    ) == planned(snapshot(), NOW_MS)


def test_losses_double_the_wait_and_are_forgotten() -> None:
    """Counted once for each absence that is no restart of hostd; the wait begins when the host is back."""
    away = snapshot(hosts=[FENCED], alive=frozenset())
    absent = {ONE: Absence(7, NOW_S - LOSS_S)}
    assert due_moves(away, {ONE: Absence(7, NOW_S - LOSS_S + 1)}, now_s=NOW_S, now_ms=NOW_MS) == ()
    (first,) = due_moves(away, absent, now_s=NOW_S, now_ms=NOW_MS)
    assert first == Loss(ONE, HostLosses(ONE, (NOW_MS,), 0))
    noted = replace(away, losses={ONE: HostLosses(ONE, (1, NOW_MS), 0)})
    assert due_moves(noted, absent, now_s=NOW_S, now_ms=NOW_MS) == ()
    back = replace(noted, alive=frozenset([ONE]))
    (waits,) = due_moves(back, {}, now_s=NOW_S, now_ms=NOW_MS)
    until_ms = NOW_MS + 2 * BACKOFF_MS
    assert waits == Loss(ONE, HostLosses(ONE, (1, NOW_MS), until_ms))
    stays = replace(back, losses={ONE: HostLosses(ONE, (1, NOW_MS), until_ms)})
    assert stays.is_backing_off(ONE, until_ms - 1)
    assert not stays.is_backing_off(ONE, until_ms)
    assert due_moves(stays, {}, now_s=NOW_S, now_ms=NOW_MS + FORGET_MS - 1) == ()
    assert due_moves(stays, {}, now_s=NOW_S, now_ms=NOW_MS + FORGET_MS) == (Loss(ONE, None),)


@pytest.mark.parametrize(
    ("code", "goal", "counts"),
    [
        ("host_lost", Goal.REMOVE, False),
        ("host_lost", Goal.STOP, False),
        ("host_lost", Goal.RUN, True),
        ("host_drained", Goal.REMOVE, True),
        ("", Goal.REMOVE, True),
    ],
)
def test_what_a_lost_host_has_left_counts_in_no_budget(code: str, goal: Goal, counts: bool) -> None:
    """Else a budget that is full would never let the sandbox begin elsewhere; on the host itself it counts until that is back."""
    order = replace(AGAIN_ORDER, goal=goal, reason=Reason(code, "…") if code else None, accounts=("team", ""))
    parts = snapshot(records=[AGAIN], assignments=[order], hosts=[FENCED])
    assert set(parts.reserved_by_account) == ({(DEMO, "team"), (DEMO, "")} if counts else set())
    assert parts.reserved_by_host[ONE].sandboxes == 1


def test_a_sandbox_that_ended_with_its_host_is_removed_without_counting_again() -> None:
    """Its owner destroys it while the host is away: the order keeps why it is there."""
    ended = replace(ORDER, goal=Goal.STOP, generation=2, reason=Reason("host_lost", "…"))
    parts = snapshot(records=[replace(WISH, goal=Goal.REMOVE, generation=3)], assignments=[ended], hosts=[FENCED])
    assert due_changes(parts) == (Order(replace(ended, goal=Goal.REMOVE, generation=3)),)


def test_a_backoff_is_bounded() -> None:
    """Twice as long each time, an hour at most, whatever is remembered."""
    waits = [backoff_ms(losses) for losses in range(LOSSES_KEPT + 3)]
    assert waits[:4] == [0, BACKOFF_MS, 2 * BACKOFF_MS, 4 * BACKOFF_MS]
    assert waits[-1] == BACKOFF_MS_MAX
    assert waits == sorted(waits)
