"""The leader's loop: look at the store, decide, commit, and look again until nothing is due.

It takes no input but creations that wait to be placed: a change says "look", never "what", and it also looks every
LOOK_INTERVAL_S, so a lost event costs seconds. One look passes over the steps in their order, each on a snapshot that has the
writes of the one before, until a pass finds nothing due:

    lifecycle -> moves -> repairs of reservations -> budgets -> plan
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum, auto

import structlog

from fleet.errors import BedplateError
from fleet.model.ids import SandboxId
from fleet.store.port import Put, Store, Unmoved
from scheduler.charges import Charges
from scheduler.commit import Change, Committer, lifecycle_changes, repair_changes
from scheduler.moves import Moves
from scheduler.placement.lifecycle import due_changes
from scheduler.placement.snapshot import repairs
from scheduler.planning import Planning
from scheduler.quotas import Quotas
from scheduler.state import FleetState
from scheduler.steps import Look, Step
from scheduler.submissions import Submissions

LOOK_INTERVAL_S = 5.0
# Statuses move all the time: changes within this time are looked at together, and the API keeps its share of the loop.
SETTLE_S = 0.05
# Passes in one look. Whatever is still due then is due in the next.
PASSES_MAX = 4
# Of the sandboxes that nothing has touched so many are looked at again once in each interval: a change that went unnoticed is
# found within minutes among 100,000 of them, and within the interval among as many as this.
AUDITED_AT_ONCE = 2000

# Long for a processor, short for whoever waits: the rest of the fleet is served every so often all the same.
CRASH_PAUSE_S = 1.0

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
        submissions: Submissions | None = None,
        quotas: Quotas | None = None,
        leader: str = "",
    ) -> None:
        self._interval_s = interval_s
        self._state = state
        self._fence = fence
        self._now_ms = now_ms
        self._clock = clock
        self._submissions = submissions if submissions is not None else Submissions()
        quotas = quotas or Quotas()
        self._committer = Committer(store, clock, quotas.cycles_kept_s)
        self._planning = Planning(state, self._submissions, leader, clock)
        # What is decided in one pass, in this order.
        self._steps: tuple[Step, ...] = (_Lifecycle(), Moves(clock), _Repairs(), Charges(), self._planning)
        self._term: Unmoved | None = None
        self._touched: set[SandboxId] = set()
        self._unaudited: list[SandboxId] = []
        self._next_audit_s = -math.inf

    async def run(self) -> None:
        """Looks until cancelled."""
        try:
            while True:
                changed = self._state.changed()
                is_outrun = False
                try:
                    is_outrun = not await self.look()
                except BedplateError as error:
                    log.warning("cycle.failed", code=error.code, error=error.message)
                except (
                    Exception
                ):  # The loop's rim: one value that nobody foresaw ends no scheduler, and is looked at again.
                    log.exception("cycle.crashed")
                    # What made it crash is most likely still there: a scheduler that spins on it would hear nothing else.
                    await asyncio.sleep(CRASH_PAUSE_S)
                await self._rest(changed, is_outrun=is_outrun)
        finally:
            self._submissions.close()

    async def look(self) -> bool:
        """Commits what is due until nothing is, a race is lost, or PASSES_MAX; raises the BedplateError of a store that is away.

        False when a race was lost: something has moved that is not seen here yet.
        """
        fence = self._fence()
        if fence is None:
            self._submissions.close()
            self._state.take_touched()
            self._term = None
            return True
        # A new leader waits until it has seen all that the one before it wrote.
        await self._state.seen(fence.mod_revision)
        await self._committer.prepare()
        if fence != self._term:
            self._term, self._unaudited = fence, []
            self._touched = self._everything()
            self._planning.begin(fence.mod_revision)
        self._submissions.open()
        self._touched |= self._audited()
        for _ in range(PASSES_MAX):
            outcome = await self._pass(fence)
            if outcome is not _Pass.BUSY:
                return outcome is _Pass.QUIET
        return True

    async def _pass(self, fence: Unmoved) -> "_Pass":
        """Every step once."""
        touched, _ = self._state.take_touched()
        self._touched |= touched
        among, is_due = frozenset(self._touched), False
        for step in self._steps:
            snapshot = self._state.snapshot()
            changes = step.due(Look(snapshot, among, self._now_ms(), self._committer.cycle_lease))
            if not changes:
                continue
            is_due = True
            if not await self._commit(fence, step, changes):
                return _Pass.OUTRUN
        self._touched.clear()
        return _Pass.BUSY if is_due else _Pass.QUIET

    async def _commit(self, fence: Unmoved, step: Step, changes: Sequence[Change]) -> bool:
        started = self._clock()
        try:
            whole = await self._committer.complete(changes, self._now_ms())
            self._expect(whole)
            outcome = await self._committer.commit(fence, whole, step.told)
        except BedplateError as error:
            step.failed(error)
            raise
        step.done()
        event = "decision.committed" if outcome.is_committed else "decision.outrun"
        duration_ms = round((self._clock() - started) * 1000, 1)
        log.info(event, kind=step.name, changes=len(changes), revision=outcome.revision, duration_ms=duration_ms)
        # What was written before a race was lost is seen before anything is decided again.
        await self._state.seen(self._committer.revision)
        return outcome.is_committed

    def _expect(self, changes: Sequence[Change]) -> None:
        """What is written here need not be decoded when the watch brings it back."""
        for change in changes:
            values = dict(change.values)
            for write in change.writes if values else ():
                if write.key in values and isinstance(write, Put):
                    self._state.written.expect(write.key, write.value, values[write.key])

    def _everything(self) -> set[SandboxId]:
        snapshot = self._state.snapshot()
        return {*snapshot.records, *snapshot.assignments, *snapshot.refusals}

    def _audited(self) -> set[SandboxId]:
        if self._clock() < self._next_audit_s:
            return set()
        self._next_audit_s = self._clock() + self._interval_s
        if not self._unaudited:
            self._unaudited = list(self._everything())
        some, self._unaudited = self._unaudited[-AUDITED_AT_ONCE:], self._unaudited[:-AUDITED_AT_ONCE]
        return set(some)

    def _pause_s(self) -> float:
        return min(self._interval_s, *(step.rest_s() for step in self._steps)) if self._term else self._interval_s

    async def _rest(self, changed: asyncio.Event, *, is_outrun: bool) -> None:
        """Returns when a creation waits, or something has changed and SETTLE_S has passed, or after the interval.

        After a lost race nothing is tried before what has moved is seen, or SETTLE_S has passed.
        """
        if is_outrun:
            with suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_S):
                    await changed.wait()
            return

        async def settled() -> None:
            await asyncio.sleep(SETTLE_S)
            await changed.wait()

        waits = [asyncio.ensure_future(settled()), asyncio.ensure_future(self._submissions.arrived.wait())]
        try:
            await asyncio.wait(waits, timeout=self._pause_s(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            # Not awaited one by one: a cancellation of this loop would be taken for theirs.
            await asyncio.wait(waits)


class _Pass(Enum):
    """What became of a pass: nothing was due, all that was due is written, or something had moved."""

    QUIET = auto()
    BUSY = auto()
    OUTRUN = auto()


class _Lifecycle(Step):
    name = "lifecycle"

    def due(self, look: Look) -> Sequence[Change]:
        return tuple(lifecycle_changes(look.snapshot, due_changes(look.snapshot, look.touched)))


class _Repairs(Step):
    name = "reservation"

    def due(self, look: Look) -> Sequence[Change]:
        return tuple(repair_changes(look.snapshot, repairs(look.snapshot)))
