"""When an agent is started again, as tables; no clock runs here."""

import pytest

from guestd.workload.restarting import PAUSE_FIRST_S, PAUSE_MAX_S, RAN_WELL_S, Restarts


@pytest.mark.parametrize(
    ("policy", "exit_code", "is_restarted"),
    [
        ("no", 0, False),
        ("no", 1, False),
        ("on-failure", 0, False),
        ("on-failure", 1, True),
        ("on-failure", None, True),
        ("always", 0, True),
        ("always", 1, True),
        ("always", None, True),
    ],
)
def test_the_exit_code_decides(policy: str, exit_code: int | None, is_restarted: bool) -> None:
    """Success is success only where the policy says so; a signal is a failure."""
    assert (Restarts(policy, 0).pause_after(exit_code, 0.0) is not None) == is_restarted


def test_pauses_double_up_to_a_minute() -> None:
    """An agent that fails at once is tried less and less often, for ever."""
    restarts = Restarts("always", 0)
    pauses = [restarts.pause_after(1, 0.1) for _ in range(9)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert (pauses[0], pauses[-1], restarts.count) == (PAUSE_FIRST_S, PAUSE_MAX_S, 9)


def test_a_start_that_ran_well_forgets_the_pauses() -> None:
    """A minute of running, and the next failure counts as the first."""
    restarts = Restarts("on-failure", 0)
    pauses = [restarts.pause_after(1, ran_s) for ran_s in (0, 0, 0, RAN_WELL_S, 0)]
    assert pauses == [1, 2, 4, 1, 2]


def test_starts_can_be_used_up() -> None:
    """After `most` restarts there is no other, and that is said."""
    restarts = Restarts("always", 2)
    assert [restarts.pause_after(1, 0) for _ in range(3)] == [1, 2, None]
    assert (restarts.count, restarts.is_used_up) == (2, True)
