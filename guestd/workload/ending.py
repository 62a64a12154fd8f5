"""When an agent must be told to end, and when it must be made to. PURE: the clock is an argument.

running -- timeout, or stop --> asked (TERM) -- grace period over --> forced (KILL)
running -- its main process has ended --> forced, at once; asked -- ... --> what it left may use up the grace period
"""

from __future__ import annotations

import math


class Ending:
    """The end of one agent. Every time is in seconds of one monotonic clock."""

    __slots__ = ("_force_at_s", "_grace_period_s", "_is_asked", "_is_forced", "_timeout_at_s", "is_timed_out")

    def __init__(self, now_s: float, timeout_s: float, grace_period_s: float) -> None:
        self._timeout_at_s = now_s + timeout_s if timeout_s > 0 else math.inf
        self._grace_period_s = grace_period_s
        self._force_at_s = math.inf
        self._is_asked = False
        self._is_forced = False
        self.is_timed_out = False

    @property
    def next_at_s(self) -> float:
        """When the next decision is due, unless something happens before; infinite for never."""
        if self._is_forced:
            return math.inf
        return self._force_at_s if self._is_asked else self._timeout_at_s

    def stop(self, now_s: float, grace_period_s: float | None = None) -> None:
        """The owner wants it to end; a later stop may only shorten the grace period."""
        grace_period_s = self._grace_period_s if grace_period_s is None else grace_period_s
        self._timeout_at_s = min(self._timeout_at_s, now_s)
        self._force_at_s = min(self._force_at_s, now_s + grace_period_s)

    def main_ended(self, now_s: float) -> None:
        """Its main process has ended: what it left behind ends now, or within the grace period that has begun."""
        if not self._is_asked:
            self._is_asked = True
            self._force_at_s = now_s

    def must_ask(self, now_s: float) -> bool:
        """Whether TERM is due; true once."""
        if self._is_asked or now_s < self._timeout_at_s:
            return False
        self._is_asked = True
        if math.isinf(self._force_at_s):
            self.is_timed_out = True
            self._force_at_s = now_s + self._grace_period_s
        return True

    def must_force(self, now_s: float) -> bool:
        """Whether KILL is due; true once."""
        if self._is_forced or not self._is_asked or now_s < self._force_at_s:
            return False
        self._is_forced = True
        return True
