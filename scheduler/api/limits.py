"""How fast one caller may change things: so much at once, then so much a second. Nobody's loop starves the others' calls."""

from collections.abc import Callable
from typing import Any

from fleet.errors import ExhaustedError
from fleet.gatekeeper import caller_of
from fleet.identity import Identity
from scheduler.quotas import Quotas

# What is written stays in the store's history until that is compacted, and a record is written anew by each change of its goal:
# past so many bytes it counts as several changes. An ordinary one has 1 to 2 KiB, the largest 170.
WRITE_BYTES = 2048
# Callers that are remembered; past it those go that have been still for long, and forgetting these changes nothing.
CALLERS_MAX = 1000


class WriteLimit:
    """A bucket of tokens for each caller."""

    def __init__(self, clock: Callable[[], float], quotas: Quotas | None = None) -> None:
        self._clock = clock
        self._quotas = quotas or Quotas()
        self._left: dict[Identity, tuple[float, float]] = {}

    def take(self, context: Any) -> None:
        """Counts one change; raises ExhaustedError `calls_exhausted` for one too many."""
        self.take_for(caller_of(context))

    def charge(self, context: Any, size_bytes: int) -> None:
        """Counts what a change that was taken writes beyond WRITE_BYTES; on credit, so that the largest can be made."""
        self.charge_for(caller_of(context), size_bytes)

    def charge_for(self, caller: Identity, size_bytes: int) -> None:
        """The same for a caller that is known."""
        now_s = self._clock()
        more = max(0, size_bytes - 1) // WRITE_BYTES
        if more:
            self._left[caller] = (self._refilled(caller, now_s) - more, now_s)

    def take_for(self, caller: Identity) -> None:
        """The same as `take` for a caller that is known."""
        now_s = self._clock()
        left = self._refilled(caller, now_s)
        if left < 1.0:
            pace = f"{self._quotas.writes_per_s:.0f} sandboxes a second (limits.writes_per_s)"
            message = f"{caller.role} {caller.name} changes more than {pace}"
            raise ExhaustedError("calls_exhausted", message, "wait a moment, then try again")
        if len(self._left) >= CALLERS_MAX:
            self._left = {
                one: kept
                for one, kept in self._left.items()
                if self._refilled(one, now_s) < self._quotas.writes_at_once
            }
        self._left[caller] = (left - 1.0, now_s)

    def _refilled(self, caller: Identity, now_s: float) -> float:
        left, since_s = self._left.get(caller, (self._quotas.writes_at_once, now_s))
        return min(self._quotas.writes_at_once, left + (now_s - since_s) * self._quotas.writes_per_s)
