"""What a client is shown, and whose it may see."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.errors import BedplateError, InvalidSpecError, NotFoundError, NotPermittedError
from fleet.identity import Identity, Role
from fleet.model.assignment import Refusal
from fleet.model.sandbox import Goal, Phase, Reason, Stage, StageName
from scheduler.api.access import find_sandbox, tenant_of
from scheduler.api.output import find_output
from scheduler.api.view import brief, view, view_removed, views_of
from tests.unit.scheduler.build import BASE, DEMO, NOW_MS, OTHER, assignment, host, record, snapshot, status

WISH = record()
ORDER = assignment(WISH, host())
REFUSAL = Refusal(WISH.sandbox_id, 0, (), NOW_MS)
NOBODY = frozenset[Any]()
# Stopped, then started again: before and after its next run has room.
STOP_ORDER = replace(ORDER, goal=Goal.STOP, generation=2)
STOPPED = status(STOP_ORDER, Phase.STOPPED, released=True)
AGAIN = replace(WISH, generation=3, run=2)
AGAIN_ORDER = assignment(AGAIN, host())
HALTED = replace(ORDER, goal=Goal.STOP, generation=2, reason=Reason("host_drained", "…"))
FENCED, BEGUN = Reason("host_fenced", "…"), (Stage(StageName.DOMAIN_STARTED, 1),)
LOST = replace(WISH, goal=Goal.STOP, generation=2, reason=Reason("host_lost", "…"))

OWN = Identity(Role.TENANT, "demo")
STRANGER = Identity(Role.TENANT, "other")
OPERATOR = Identity(Role.OPERATOR, "root")

PHASES = [
    (Phase.PENDING, WISH, {}),
    (Phase.STOPPED, replace(WISH, goal=Goal.STOP), {}),
    (Phase.REMOVING, replace(WISH, goal=Goal.REMOVE), {}),
    (Phase.ASSIGNED, WISH, {"assignments": [ORDER]}),
    (Phase.LOST, WISH, {"assignments": [ORDER], "alive": NOBODY}),
    (Phase.STARTING, WISH, {"assignments": [ORDER], "statuses": [status(ORDER, Phase.STARTING)]}),
    (Phase.RUNNING, WISH, {"assignments": [ORDER], "statuses": [status(ORDER)]}),
    (Phase.LOST, WISH, {"assignments": [ORDER], "statuses": [status(ORDER)], "alive": NOBODY}),
    (
        Phase.COMPLETED,
        WISH,
        {"assignments": [ORDER], "statuses": [status(ORDER, Phase.COMPLETED)], "alive": NOBODY},
    ),
    (Phase.REMOVING, replace(WISH, goal=Goal.REMOVE), {"assignments": [ORDER], "statuses": [status(ORDER)]}),
    (Phase.PENDING, AGAIN, {"assignments": [STOP_ORDER], "statuses": [STOPPED]}),
    (Phase.PENDING, AGAIN, {"assignments": [STOP_ORDER], "statuses": [STOPPED], "alive": NOBODY}),
    (Phase.ASSIGNED, AGAIN, {"assignments": [AGAIN_ORDER], "statuses": [STOPPED]}),
    (Phase.STARTING, AGAIN, {"assignments": [AGAIN_ORDER], "statuses": [status(AGAIN_ORDER, Phase.STARTING)]}),
    (
        Phase.STOPPED,
        replace(AGAIN, goal=Goal.STOP, generation=4),
        {"assignments": [STOP_ORDER], "statuses": [STOPPED]},
    ),
    # Moves: what the host calls an end is none while another placement follows.
    (Phase.PENDING, replace(WISH, placement=2), {"assignments": [replace(ORDER, goal=Goal.REMOVE)]}),
    (Phase.PENDING, WISH, {"assignments": [HALTED], "statuses": [status(HALTED, Phase.STOPPED, released=True)]}),
    (Phase.RUNNING, WISH, {"assignments": [HALTED], "statuses": [status(HALTED)]}),
    (Phase.COMPLETED, WISH, {"assignments": [HALTED], "statuses": [status(HALTED, Phase.COMPLETED)]}),
    (Phase.LOST, WISH, {"assignments": [ORDER], "statuses": [status(ORDER, Phase.FAILED, reason=FENCED)]}),
    (
        Phase.FAILED,
        WISH,
        {"assignments": [ORDER], "statuses": [status(ORDER, Phase.FAILED, reason=FENCED, stages=BEGUN)]},
    ),
    (Phase.FAILED, LOST, {"assignments": [ORDER], "statuses": [status(ORDER)], "alive": NOBODY}),
    (Phase.FAILED, LOST, {"assignments": [ORDER], "alive": NOBODY}),
    # An order for another tenant's sandbox of the same id says nothing about this one.
    (Phase.PENDING, WISH, {"assignments": [replace(ORDER, tenant=OTHER)]}),
]


@pytest.mark.parametrize(("phase", "wish", "parts"), PHASES)
def test_the_phase_is_joined(phase: Phase, wish: Any, parts: dict[str, Any]) -> None:
    """The phase follows from wish, order, status and the host's life, in that order of weight."""
    assert view(wish, snapshot(records=[wish], hosts=[host()], **parts)).phase is phase


@pytest.mark.parametrize("goal", [Goal.RUN, Goal.REMOVE])
def test_a_host_that_is_away_is_told(goal: Goal) -> None:
    """Whoever waits for a sandbox, or for its end, learns that its host is not heard of, and hears no more of it afterwards."""
    wish = replace(WISH, goal=goal)
    parts: dict[str, Any] = {"records": [wish], "hosts": [host()], "assignments": [ORDER], "statuses": [status(ORDER)]}
    away = view(wish, snapshot(**parts, alive=NOBODY)).status
    assert away is not None
    assert away.reason is not None
    assert (away.reason.code, bool(away.reason.next_step)) == ("host_lost", True)
    assert view(wish, snapshot(**parts)).status == status(ORDER)


def test_a_view_has_all_there_is() -> None:
    """Host, image digest, status and refusal are shown where they mean something."""
    published = status(ORDER)
    shown = view(WISH, snapshot(records=[WISH], hosts=[host()], assignments=[ORDER], statuses=[published]))
    assert (shown.host_id, shown.image_digest, shown.status) == (host().host_id, BASE, published)
    waiting = snapshot(records=[WISH], refusals={WISH.sandbox_id: REFUSAL})
    assert view(WISH, waiting).refusal == REFUSAL
    assert view(replace(WISH, goal=Goal.STOP), waiting).refusal is None


def test_a_sandbox_that_waits_for_its_next_run_shows_why() -> None:
    """Its host stays known and the refusal is shown; what the host said of the run before is not shown for this one."""
    parts: dict[str, Any] = {"records": [AGAIN], "hosts": [host()], "assignments": [STOP_ORDER], "statuses": [STOPPED]}
    shown = view(AGAIN, snapshot(**parts, refusals={WISH.sandbox_id: REFUSAL}))
    assert (shown.host_id, shown.refusal, shown.status, shown.run) == (host().host_id, REFUSAL, None, 2)


def test_the_last_view_is_of_a_removed_sandbox() -> None:
    """What is gone is shown as it was last, removed."""
    last = view_removed(view(WISH, snapshot(records=[WISH])))
    assert (last.phase, last.sandbox_id, last.spec) == (Phase.REMOVED, WISH.sandbox_id, WISH.spec)


def test_a_listing_is_brief_and_in_order() -> None:
    """A listing has the oldest first and leaves out what may be long; a tenant's has only its own."""
    first, second = record(5, created_at_ms=1), record(1, created_at_ms=2)
    foreign = record(7, tenant=OTHER)
    seen = snapshot(records=[second, foreign, first])
    assert [one.sandbox_id for one in views_of(seen, DEMO)] == [first.sandbox_id, second.sandbox_id]
    assert len(views_of(seen, None)) == 3
    (agent,) = brief(views_of(seen, OTHER)[0]).spec.agents
    assert (agent.name, agent.command, agent.prompt, agent.env) == ("worker", (), "", ())


@pytest.mark.parametrize(
    ("caller", "named", "answer"),
    [
        (OWN, "", DEMO),
        (OWN, "demo", DEMO),
        (OWN, "other", NotPermittedError),
        (OPERATOR, "demo", DEMO),
        (OPERATOR, "", InvalidSpecError),
        (OPERATOR, "../x", InvalidSpecError),
    ],
)
def test_a_call_acts_for_one_tenant(caller: Identity, named: str, answer: Any) -> None:
    """A tenant acts for itself only; an operator says for whom."""
    if isinstance(answer, str):
        assert tenant_of(caller, named) == answer
    else:
        with pytest.raises(answer):
            tenant_of(caller, named)


def test_sandboxes_are_found_by_id_and_by_name() -> None:
    """Both lead to the same record for its tenant, and for an operator who names the tenant, or the id alone."""
    seen = snapshot(records=[WISH], names={(DEMO, WISH.spec.name): WISH.sandbox_id})
    for named in (WISH.sandbox_id, WISH.spec.name):
        assert find_sandbox(seen, OWN, named, "") == WISH
        assert find_sandbox(seen, OPERATOR, named, "demo") == WISH
    assert find_sandbox(seen, OPERATOR, WISH.sandbox_id, "") == WISH


def test_a_strangers_sandbox_is_as_unknown_as_none() -> None:
    """What another tenant has gives the very answer that nothing gives."""
    seen = snapshot(records=[WISH], names={(DEMO, WISH.spec.name): WISH.sandbox_id})
    nothing = snapshot()
    for named in (WISH.sandbox_id, WISH.spec.name):
        answers = []
        for one in (seen, nothing):
            with pytest.raises(NotFoundError) as caught:
                find_sandbox(one, STRANGER, named, "")
            answers.append((caught.value.code, caught.value.message, caught.value.next_step))
        assert answers[0] == answers[1]
    with pytest.raises(BedplateError):
        find_sandbox(seen, STRANGER, WISH.sandbox_id, "demo")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"records": [WISH]}, (None, False)),
        ({"records": [WISH], "assignments": [ORDER]}, (None, False)),
        ({"records": [WISH], "assignments": [ORDER], "statuses": [status(ORDER)]}, (host().host_id, False)),
        ({"records": [AGAIN], "assignments": [STOP_ORDER], "statuses": [STOPPED]}, (host().host_id, False)),
        ({"records": [replace(WISH, goal=Goal.STOP)]}, (None, True)),
        ({}, (None, True)),
    ],
)
def test_where_output_is(parts: dict[str, Any], expected: Any) -> None:
    """Output is on the host that has published a status; one that was stopped before, or is gone, will never have any."""
    assert find_output(snapshot(**parts), WISH) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"records": [AGAIN], "assignments": [STOP_ORDER], "statuses": [STOPPED]}, None),
        ({"records": [AGAIN], "assignments": [AGAIN_ORDER], "statuses": [STOPPED]}, None),
        ({"records": [AGAIN], "assignments": [AGAIN_ORDER], "statuses": [status(AGAIN_ORDER)]}, host().host_id),
        ({"records": [WISH], "assignments": [STOP_ORDER], "statuses": [STOPPED]}, host().host_id),
    ],
)
def test_who_follows_waits_for_the_next_run(parts: dict[str, Any], expected: Any) -> None:
    """A follow of a started sandbox begins when its host speaks of the new run: the run before has ended, and would end it."""
    assert find_output(snapshot(**parts), WISH, is_followed=True) == (expected, False)
