"""When agents are told to end, as tables under a clock that is an argument."""

import math

import pytest

from guestd.workload.ending import Ending


def test_without_a_timeout_nothing_is_ever_due() -> None:
    """An agent without a timeout runs as long as it likes."""
    ending = Ending(0.0, 0.0, 30.0)
    assert ending.next_at_s == math.inf
    assert not ending.must_ask(1e9)
    assert not ending.must_force(1e9)


def test_a_timeout_asks_once_and_forces_after_the_grace_period() -> None:
    """TERM at the timeout, KILL a grace period later, each once."""
    ending = Ending(100.0, 10.0, 5.0)
    assert ending.next_at_s == 110.0
    assert [ending.must_ask(now) for now in (109.9, 110.0, 111.0)] == [False, True, False]
    assert (ending.is_timed_out, ending.next_at_s) == (True, 115.0)
    assert [ending.must_force(now) for now in (114.9, 115.0, 116.0)] == [False, True, False]
    assert ending.next_at_s == math.inf


def test_a_stop_is_no_timeout() -> None:
    """An agent that its owner stops is asked at once and has not timed out."""
    ending = Ending(0.0, 100.0, 5.0)
    ending.stop(10.0)
    assert ending.must_ask(10.0)
    assert (ending.is_timed_out, ending.next_at_s) == (False, 15.0)


def test_a_later_stop_only_shortens_the_grace_period() -> None:
    """Impatience counts, patience comes too late."""
    ending = Ending(0.0, 0.0, 30.0)
    ending.stop(10.0, 20.0)
    ending.stop(11.0, 100.0)
    assert ending.must_ask(11.0)
    assert ending.next_at_s == 30.0
    ending.stop(12.0, 0.0)
    assert ending.must_force(12.0)


def test_a_stop_without_grace_forces_in_the_same_turn() -> None:
    """A grace period of 0 is TERM and KILL at once."""
    ending = Ending(0.0, 0.0, 0.0)
    ending.stop(1.0)
    assert ending.must_ask(1.0)
    assert ending.must_force(1.0)


def test_what_an_agent_leaves_behind_ends_at_once() -> None:
    """A main process that ends by itself takes everything with it."""
    ending = Ending(0.0, 100.0, 30.0)
    ending.main_ended(5.0)
    assert not ending.must_ask(5.0)
    assert ending.must_force(5.0)
    assert not ending.is_timed_out


@pytest.mark.parametrize("now", [12.0, 14.9])
def test_what_is_left_of_an_asked_agent_keeps_its_grace_period(now: float) -> None:
    """After a TERM the children may go on cleaning up although the main process has ended."""
    ending = Ending(0.0, 10.0, 5.0)
    ending.must_ask(10.0)
    ending.main_ended(11.0)
    assert not ending.must_force(now)
    assert ending.must_force(15.0)
