"""What becomes of a sandbox whose wish has changed, or whose host has answered."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.model.assignment import Refusal
from fleet.model.sandbox import Goal, Phase
from scheduler.placement.lifecycle import Dismissal, Order, Removal, Withdrawal, due_changes
from tests.unit.scheduler.build import NOW_MS, OTHER, assignment, host, record, snapshot, status

WISH = record()
ORDER = assignment(WISH, host())
STOP = replace(WISH, goal=Goal.STOP, generation=2)
STOP_ORDER = replace(ORDER, goal=Goal.STOP, generation=2)
AGAIN = replace(WISH, generation=3, run=2)
REMOVE = replace(WISH, goal=Goal.REMOVE, generation=2)
REMOVE_ORDER = replace(ORDER, goal=Goal.REMOVE, generation=2)
GONE = status(REMOVE_ORDER, Phase.REMOVED, released=True)
REFUSAL = Refusal(WISH.sandbox_id, 0, (), NOW_MS)

CASES: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
    ("pending", {"records": [WISH]}, ()),
    ("pending and refused", {"records": [WISH], "refusals": {WISH.sandbox_id: REFUSAL}}, ()),
    ("assigned", {"records": [WISH], "assignments": [ORDER]}, ()),
    (
        "stopped",
        {"records": [STOP], "assignments": [ORDER]},
        (Order(replace(ORDER, goal=Goal.STOP, generation=2)),),
    ),
    (
        "stopped before it had a host",
        {"records": [STOP], "refusals": {WISH.sandbox_id: REFUSAL}},
        (Withdrawal(WISH.sandbox_id),),
    ),
    ("removed before it had a host", {"records": [REMOVE]}, (Removal(WISH.sandbox_id, REMOVE, None),)),
    (
        "to run again, which the plan decides",
        {"records": [AGAIN], "assignments": [STOP_ORDER], "refusals": {WISH.sandbox_id: REFUSAL}},
        (),
    ),
    (
        "stopped again before it had room",
        {"records": [replace(AGAIN, goal=Goal.STOP, generation=4)], "assignments": [STOP_ORDER]},
        (Order(replace(STOP_ORDER, generation=4)),),
    ),
    (
        "removed before it had room again",
        {"records": [replace(AGAIN, goal=Goal.REMOVE, generation=4)], "assignments": [STOP_ORDER]},
        (Order(replace(STOP_ORDER, goal=Goal.REMOVE, generation=4)),),
    ),
    ("to be removed", {"records": [REMOVE], "assignments": [ORDER]}, (Order(REMOVE_ORDER),)),
    ("its host has not answered", {"records": [REMOVE], "assignments": [REMOVE_ORDER]}, ()),
    (
        "its host has answered another order",
        {"records": [REMOVE], "assignments": [REMOVE_ORDER], "statuses": [replace(GONE, generation=1)]},
        (),
    ),
    (
        "its host still holds something",
        {"records": [REMOVE], "assignments": [REMOVE_ORDER], "statuses": [replace(GONE, released=False)]},
        (),
    ),
    (
        "its host still removes it",
        {"records": [REMOVE], "assignments": [REMOVE_ORDER], "statuses": [replace(GONE, phase=Phase.REMOVING)]},
        (),
    ),
    (
        "its host is done",
        {"records": [REMOVE], "assignments": [REMOVE_ORDER], "statuses": [GONE]},
        (Dismissal(REMOVE_ORDER),),
    ),
    ("its host has not forgotten it yet", {"records": [REMOVE], "statuses": [GONE]}, ()),
    ("an order without a record", {"assignments": [ORDER]}, (Order(REMOVE_ORDER),)),
    (
        "an order of another tenant's",
        {"records": [replace(WISH, tenant=OTHER)], "assignments": [ORDER]},
        (Order(REMOVE_ORDER),),
    ),
    (
        "an order without a record, done",
        {"assignments": [REMOVE_ORDER], "statuses": [GONE]},
        (Removal(WISH.sandbox_id, None, REMOVE_ORDER),),
    ),
    (
        "an order whose record cannot be read",
        {"assignments": [ORDER], "opaque_sandboxes": frozenset([WISH.sandbox_id])},
        (),
    ),
    (
        "a record whose order cannot be read",
        {"records": [REMOVE], "opaque_sandboxes": frozenset([WISH.sandbox_id])},
        (),
    ),
    (
        "assigned and still refused",
        {"records": [WISH], "assignments": [ORDER], "refusals": {WISH.sandbox_id: REFUSAL}},
        (Withdrawal(WISH.sandbox_id),),
    ),
    ("a refusal of nothing", {"refusals": {WISH.sandbox_id: REFUSAL}}, (Withdrawal(WISH.sandbox_id),)),
]


@pytest.mark.parametrize(("parts", "due"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_due(parts: dict[str, Any], due: tuple[Any, ...]) -> None:
    """Exactly this is due, and nothing else."""
    assert due_changes(snapshot(hosts=[host()], **parts)) == due
