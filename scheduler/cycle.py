"""The leader's loop: look at the store, decide, commit, and look again until nothing is due.

It takes no input: a change says "look", never "what", and it also looks every LOOK_INTERVAL_S, so a lost event costs seconds.
In one look: lifecycle, then reservations, then the plan; each is decided on a snapshot that has the writes of the one before.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from fleet.errors import BedplateError
from fleet.store.port import Store, Unmoved
from scheduler.commit import Change, Committer, lifecycle_changes, plan_changes, repair_changes
from scheduler.placement.lifecycle import due_changes
from scheduler.placement.plan import plan
from scheduler.placement.snapshot import Snapshot, repairs
from scheduler.state import FleetState

LOOK_INTERVAL_S = 5.0
# Statuses move all the time: changes within this time are looked at together, and the API keeps its share of the loop.
SETTLE_S = 0.05
# Lifecycle, reservations and plan, twice over. Whatever is still due then is due in the next look.
ROUNDS_MAX = 6

log = structlog.get_logger()


class Cycle:
    """Decides and commits while `fence` gives the condition that this scheduler leads."""

    def __init__(
        self,
        store: Store,
        state: FleetState,
        fence: Callable[[], Unmoved | None],
        now_ms: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        *,
        interval_s: float = LOOK_INTERVAL_S,
    ) -> None:
        self._interval_s = interval_s
        self._state = state
        self._fence = fence
        self._now_ms = now_ms
        self._committer = Committer(store, clock)

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            changed = self._state.changed()
            try:
                await self.look()
            except BedplateError as error:
                log.warning("cycle.failed", code=error.code, error=error.message)
            await asyncio.sleep(SETTLE_S)
            try:
                async with asyncio.timeout(self._interval_s):
                    await changed.wait()
            except TimeoutError:
                continue

    async def look(self) -> None:
        """Commits what is due until nothing is, a race is lost, or ROUNDS_MAX; raises the BedplateError of a store that is away."""
        fence = self._fence()
        if fence is None:
            return
        # A new leader waits until it has seen all that the one before it wrote.
        snapshot = await self._state.seen(fence.mod_revision)
        for _ in range(ROUNDS_MAX):
            started = time.monotonic()
            kind, changes = self._decide(snapshot)
            if not changes:
                return
            outcome = await self._committer.commit(fence, await self._committer.complete(changes, self._now_ms()))
            event = "decision.committed" if outcome.is_committed else "decision.outrun"
            duration_ms = round((time.monotonic() - started) * 1000, 1)
            log.info(event, kind=kind, changes=len(changes), revision=outcome.revision, duration_ms=duration_ms)
            if not outcome.is_committed:
                return
            snapshot = await self._state.seen(outcome.revision)

    def _decide(self, snapshot: Snapshot) -> tuple[str, Sequence[Change]]:
        """The first kind of change that is due; reads the snapshot in one go, for it moves on with the store."""
        due = due_changes(snapshot)
        if due:
            return "lifecycle", tuple(lifecycle_changes(snapshot, due))
        wrong = repairs(snapshot)
        if wrong:
            return "reservation", tuple(repair_changes(snapshot, wrong))
        return "plan", tuple(plan_changes(snapshot, plan(snapshot, self._now_ms())))
