"""The cycle's step that places: what waits in the store, and creations that are accepted and placed in one transaction.

Each plan is told in a CycleRecord, written with its first group, by which it can be decided again.
"""

import time
from collections.abc import Callable, Sequence

from fleet.codec import encode
from fleet.errors import BedplateError
from fleet.model.cycle import CycleRecord
from fleet.model.ids import SandboxId
from fleet.model.sandbox import SandboxRecord
from fleet.store.keyspace import cycle_key
from fleet.store.port import Committed, Put
from scheduler.commit import Change, plan_changes
from scheduler.decisions import digest_of, seed_of, settings_digest, version
from scheduler.moves import move_changes
from scheduler.placement.plan import PLACEMENTS_MAX, Plan, plan
from scheduler.placement.snapshot import Snapshot
from scheduler.state import FleetState
from scheduler.steps import Look, Step
from scheduler.submissions import Submission, Submissions

# While more than this wait, and a plan has just found no room for them, creations are placed without looking at all of them
# again; that look may take a tenth of the time.
BACKLOG_MIN = 200
BACKLOG_PAUSE = 10.0
# A creation that lost so many races with its group is tried alone: it may be what stands in the group's way.
RACES_MAX = 3


class Planning(Step):
    """Plans; answers the creations that it took from the queue."""

    name = "plan"

    def __init__(self, state: FleetState, submissions: Submissions, leader: str, clock: Callable[[], float]) -> None:
        self._state = state
        self._submissions = submissions
        self._leader = leader
        self._clock = clock
        self._taken: dict[SandboxId, Submission] = {}
        self._term = 0
        self._count = 0
        self._next_full_s = 0.0

    def begin(self, term_revision: int) -> None:
        """This scheduler leads from now on."""
        self._term, self._count, self._next_full_s = term_revision, 0, 0.0

    def due(self, look: Look) -> Sequence[Change]:
        """Placements and refusals of what waits."""
        snapshot = look.snapshot
        submitted = [one for one in self._submissions.take(PLACEMENTS_MAX) if self._is_new(snapshot, one)]
        is_full = len(snapshot.sums.pending) <= BACKLOG_MIN or self._clock() >= self._next_full_s
        waiting = (snapshot.pending() if is_full else []) + [one.record for one in submitted]
        if not waiting:
            return ()
        self._taken = {one.record.sandbox_id: one for one in submitted}
        started = time.monotonic()
        cycle = f"{self._term:x}-{self._count}"
        cluster = self._state.cluster(look.now_ms)
        made = plan(snapshot, cluster, waiting, now_ms=look.now_ms, seed=seed_of(cycle), settings=self._state.settings)
        if is_full:
            pause_s = BACKLOG_PAUSE * (time.monotonic() - started) if made.is_whole else 0.0
            self._next_full_s = self._clock() + pause_s
        changes = list(plan_changes(snapshot, made, cycle, self._taken))
        changes += move_changes(snapshot, made.evictions, look.now_ms)
        self._leave(made)
        if not changes:
            return ()
        self._count += 1
        record = self._record(look, cycle, made, [one.record for one in submitted], is_full=is_full)
        return (Change((), (Put(cycle_key(cycle), encode(record), look.cycle_lease),)), *changes)

    def told(self, changes: Sequence[Change], outcome: Committed) -> None:
        """A group was written, or lost its race: the creations in it are answered, or tried again."""
        for change in changes:
            one = self._taken.get(change.about) if change.about is not None else None
            if one is None:
                continue
            one.races += not outcome.is_committed
            if outcome.is_committed or one.races >= RACES_MAX:
                one.conclude(outcome.revision if outcome.is_committed else None)
                del self._taken[one.record.sandbox_id]

    def failed(self, error: BedplateError) -> None:
        """Whoever waits is told to ask again."""
        for one in self._taken.values():
            one.fail(error)
        self._taken = {}

    def done(self) -> None:
        """What was not written waits for the next plan."""
        self._submissions.put_back(list(self._taken.values()))
        self._taken = {}

    def _is_new(self, snapshot: Snapshot, one: Submission) -> bool:
        """Whether nothing of it is known; else its creation is tried alone, which tells what stands in its way."""
        record = one.record
        if record.sandbox_id not in snapshot.records and (record.tenant, record.spec.name) not in snapshot.names:
            return True
        one.conclude(None)
        return False

    def _leave(self, made: Plan) -> None:
        """What was submitted and not decided goes back, in its order."""
        decided = {one.sandbox_id for one in made.assignments} | {one.sandbox_id for one in made.refusals}
        left = [one for sandbox_id, one in self._taken.items() if sandbox_id not in decided]
        self._taken = {sandbox_id: one for sandbox_id, one in self._taken.items() if sandbox_id in decided}
        self._submissions.put_back(left)

    def _record(
        self, look: Look, cycle: str, made: Plan, submitted: Sequence[SandboxRecord], *, is_full: bool
    ) -> CycleRecord:
        return CycleRecord(
            cycle=cycle,
            leader=self._leader,
            term_revision=self._term,
            revision=look.snapshot.revision,
            now_ms=look.now_ms,
            seed=seed_of(cycle),
            version=version(),
            settings_digest=settings_digest(self._state.settings),
            input_digest=look.snapshot.digest,
            submitted=tuple(one.sandbox_id for one in submitted),
            decisions=made.decisions,
            decisions_digest=digest_of(made.decisions),
            is_full=is_full,
        )
