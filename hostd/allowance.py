"""A budget that fills with time: what may be spent at once, and how fast it comes back. PURE: the clock is given."""

from collections.abc import Callable


class Allowance:
    """Begins full with `burst`, and regains `rate_per_s` up to it."""

    def __init__(self, rate_per_s: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._clock = clock
        self._left = burst
        self._at_s = clock()

    def spend(self, cost: float) -> float:
        """Spends `cost`, on credit if need be; the seconds after which nothing is owed any more, 0 when nothing is."""
        now_s = self._clock()
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._rate_per_s) - cost
        self._at_s = now_s
        return max(0.0, -self._left / self._rate_per_s)
