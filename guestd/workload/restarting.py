"""Whether and when an agent that has ended is started again. PURE: times are arguments.

running -- its main process has ended, and nothing is left --> resting -- the pause is over --> running
resting or running -- stop, timeout --> ended for good
"""

from __future__ import annotations

from guestd.configuration import NO, ON_FAILURE

# The first pause: long enough that a program which fails at once does not take the guest, short enough for a person.
PAUSE_FIRST_S = 1.0
PAUSE_MAX_S = 60.0
# A start that ran as long was no failure to start: the next pause is a first one.
RAN_WELL_S = 60.0


class Restarts:
    """The starts of one agent after its first."""

    __slots__ = ("_next_pause_s", "_policy", "count", "is_used_up", "most")

    def __init__(self, policy: str, most: int) -> None:
        """`most` is unlimited at 0."""
        self._policy = policy
        self._next_pause_s = PAUSE_FIRST_S
        self.most = most
        self.count = 0
        self.is_used_up = False

    def pause_after(self, exit_code: int | None, ran_s: float) -> float | None:
        """How long to rest before the next start, or None for no other; counts that start. A signal has no exit code."""
        if self._policy == NO or (self._policy == ON_FAILURE and exit_code == 0):
            return None
        if self.most and self.count >= self.most:
            self.is_used_up = True
            return None
        self.count += 1
        pause_s = PAUSE_FIRST_S if ran_s >= RAN_WELL_S else self._next_pause_s
        self._next_pause_s = min(2 * pause_s, PAUSE_MAX_S)
        return pause_s
