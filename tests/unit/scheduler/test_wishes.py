"""What a stop, a start and a destroy make of a record, in every state that a sandbox can be in."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fleet.errors import ConflictError
from fleet.model.sandbox import Goal, Phase, Reason, SandboxRecord
from scheduler.api import wishes
from tests.unit.scheduler.build import assignment, host, record, snapshot, status

WISH = record()
ORDER = assignment(WISH, host())
STOP = replace(WISH, goal=Goal.STOP, generation=2)
STOP_ORDER = replace(ORDER, goal=Goal.STOP, generation=2)
STOPPED = status(STOP_ORDER, Phase.STOPPED, released=True)
AGAIN = replace(WISH, generation=3, run=2)
AGAIN_ORDER = assignment(AGAIN, host())
AGAIN_STOP = replace(AGAIN, goal=Goal.STOP, generation=4)
AGAIN_STOP_ORDER = replace(AGAIN_ORDER, goal=Goal.STOP, generation=4)
REMOVE = replace(WISH, goal=Goal.REMOVE, generation=4)
HALTED = replace(ORDER, goal=Goal.STOP, generation=2, reason=Reason("host_drained", "…"))
MOVED = replace(WISH, generation=2, placement=2, reason=HALTED.reason)
GONE_ORDER = replace(ORDER, goal=Goal.REMOVE, generation=3)
LOST = replace(WISH, goal=Goal.STOP, generation=2, reason=Reason("host_lost", "…"))

# Each state: the record, order and status in it; what a stop and a start make of it: goal, generation, run, or None for an error.
STATES: list[tuple[str, SandboxRecord, dict[str, Any], Any, Any]] = [
    ("pending", WISH, {}, (Goal.STOP, 2, 1), None),
    ("assigned", WISH, {"assignments": [ORDER]}, (Goal.STOP, 2, 1), None),
    ("running", WISH, {"assignments": [ORDER], "statuses": [status(ORDER)]}, (Goal.STOP, 2, 1), None),
    (
        "completed",
        WISH,
        {"assignments": [ORDER], "statuses": [status(ORDER, Phase.COMPLETED, released=True)]},
        (Goal.RUN, 1, 1),
        None,
    ),
    ("failed", WISH, {"assignments": [ORDER], "statuses": [status(ORDER, Phase.FAILED)]}, (Goal.RUN, 1, 1), None),
    ("moved, without room yet", MOVED, {"assignments": [GONE_ORDER]}, (Goal.STOP, 3, 1), None),
    ("lost with its host", LOST, {"assignments": [ORDER], "statuses": [status(ORDER)]}, (Goal.STOP, 2, 1), None),
    (
        "halted, and about to move",
        WISH,
        {"assignments": [HALTED], "statuses": [status(HALTED, Phase.STOPPED, released=True)]},
        (Goal.STOP, 2, 1),
        None,
    ),
    ("stopped before it had a host", STOP, {}, (Goal.STOP, 2, 1), (Goal.RUN, 3, 1)),
    ("stopping", STOP, {"assignments": [STOP_ORDER], "statuses": [status(ORDER)]}, (Goal.STOP, 2, 1), None),
    (
        "stopped, not released",
        STOP,
        {"assignments": [STOP_ORDER], "statuses": [replace(STOPPED, released=False)]},
        (Goal.STOP, 2, 1),
        None,
    ),
    ("stopped", STOP, {"assignments": [STOP_ORDER], "statuses": [STOPPED]}, (Goal.STOP, 2, 1), (Goal.RUN, 3, 2)),
    (
        "completed as it was stopped",
        STOP,
        {"assignments": [STOP_ORDER], "statuses": [replace(STOPPED, phase=Phase.COMPLETED)]},
        (Goal.STOP, 2, 1),
        None,
    ),
    (
        "started, without room yet",
        AGAIN,
        {"assignments": [STOP_ORDER], "statuses": [STOPPED]},
        (Goal.STOP, 4, 2),
        (Goal.RUN, 3, 2),
    ),
    (
        "started and ordered",
        AGAIN,
        {"assignments": [AGAIN_ORDER], "statuses": [STOPPED]},
        (Goal.STOP, 4, 2),
        (Goal.RUN, 3, 2),
    ),
    (
        "stopped again before its host spoke of the second run",
        AGAIN_STOP,
        {"assignments": [AGAIN_STOP_ORDER], "statuses": [STOPPED]},
        (Goal.STOP, 4, 2),
        None,
    ),
    (
        "stopped again before it had room",
        AGAIN_STOP,
        {"assignments": [STOP_ORDER], "statuses": [STOPPED]},
        (Goal.STOP, 4, 2),
        (Goal.RUN, 5, 3),
    ),
    (
        "running again",
        AGAIN,
        {"assignments": [AGAIN_ORDER], "statuses": [status(AGAIN_ORDER)]},
        (Goal.STOP, 4, 2),
        (Goal.RUN, 3, 2),
    ),
    (
        "completed in its second run",
        AGAIN,
        {"assignments": [AGAIN_ORDER], "statuses": [status(AGAIN_ORDER, Phase.COMPLETED, released=True)]},
        (Goal.RUN, 3, 2),
        None,
    ),
    (
        "started, and stopped before it had room",
        replace(AGAIN, goal=Goal.STOP, generation=4),
        {"assignments": [replace(STOP_ORDER, generation=4)], "statuses": [STOPPED]},
        (Goal.STOP, 4, 2),
        (Goal.RUN, 5, 3),
    ),
    ("being removed", REMOVE, {"assignments": [STOP_ORDER], "statuses": [STOPPED]}, (Goal.REMOVE, 4, 1), None),
]


@pytest.mark.parametrize(("wish", "parts", "stopped", "started"), [s[1:] for s in STATES], ids=[s[0] for s in STATES])
def test_a_wish_in_every_state(wish: SandboxRecord, parts: dict[str, Any], stopped: Any, started: Any) -> None:
    """What has ended is not stopped anew; only what is stopped and released starts, and a start that comes twice starts once."""
    seen = snapshot(records=[wish], hosts=[host()], **parts)
    cases: list[tuple[Callable[..., SandboxRecord], Any]] = [(wishes.stop, stopped), (wishes.start, started)]
    for ask, expected in cases:
        if expected is None:
            with pytest.raises(ConflictError) as caught:
                ask(wish, seen)
            assert (caught.value.code, bool(caught.value.next_step)) == ("not_stopped", True)
        else:
            made = ask(wish, seen)
            assert (made.goal, made.generation, made.run) == expected
            # Why the scheduler moved it is over with its owner's word.
            same = replace(made, goal=wish.goal, generation=wish.generation, run=wish.run, reason=wish.reason)
            assert (same, made.reason) == (wish, wish.reason if made == wish else None)
            assert ask(made, seen) == made
    removed = wishes.remove(wish, seen)
    assert (removed.goal, wishes.remove(removed, seen)) == (Goal.REMOVE, removed)
