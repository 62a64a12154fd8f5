"""What is tried again when a call has failed, and how often."""

import pytest

from fleet.errors import ConflictError, UnavailableError
from mb.resume import RECONNECTS_MAX, Reconnects

LATE = UnavailableError("deadline_exceeded", "host rack1-07 did not answer in time", "try again")


class Waits:
    """A pause that takes no time and is counted."""

    def __init__(self) -> None:
        self.spans_s: list[float] = []

    async def __call__(self, span_s: float) -> None:
        self.spans_s.append(span_s)


async def test_a_calls_deadline_is_a_failure_like_any_other() -> None:
    """A host that never answers in time is told after a while, with longer pauses in between, and not asked for ever."""
    waits, notes = Waits(), list[str]()
    reconnects = Reconnects(notes.append, is_stream=False, pause=waits)
    for _ in range(RECONNECTS_MAX):
        await reconnects.retry_after(LATE)
    with pytest.raises(UnavailableError):
        await reconnects.retry_after(LATE)
    assert len(waits.spans_s) == RECONNECTS_MAX
    assert waits.spans_s == sorted(waits.spans_s)
    assert notes == ["host rack1-07 did not answer in time; trying again"]


async def test_a_streams_deadline_is_none() -> None:
    """A quiet stream that is opened anew after its deadline costs no pause, no word and no try."""
    waits, notes = Waits(), list[str]()
    reconnects = Reconnects(notes.append, pause=waits)
    for _ in range(10 * RECONNECTS_MAX):
        await reconnects.retry_after(LATE)
    assert (waits.spans_s, notes) == ([], [])


async def test_what_does_not_pass_is_not_tried_again() -> None:
    """An error that time does not mend is raised at once."""
    waits = Waits()
    with pytest.raises(ConflictError):
        await Reconnects(lambda _text: None, pause=waits).retry_after(ConflictError("taken", "it is taken"))
    assert waits.spans_s == []
