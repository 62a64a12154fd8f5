"""Creations that wait to be accepted and placed in one transaction, on the scheduler that leads; a bounded queue.

A creation that is not placed this way, because this scheduler does not lead, or lost a race, is answered with None: whoever
offered it writes the record alone, and it is placed as a pending sandbox. Nothing is acknowledged before it is in the store.
"""

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field

from fleet.errors import ExhaustedError
from fleet.model.ids import SandboxId, Tenant
from fleet.model.sandbox import SandboxRecord
from scheduler.quotas import SUBMISSIONS_MAX


@dataclass(slots=True, eq=False)
class Submission:
    """A wish that shall be written with its placement; `answer` is the revision at which it was, or None if it was not.

    `races` counts those that were lost with it.
    """

    record: SandboxRecord
    actor: str
    answer: "asyncio.Future[int | None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    races: int = 0

    def conclude(self, revision: int | None) -> None:
        """Answers, unless nobody waits any more."""
        if not self.answer.done():
            self.answer.set_result(revision)

    def fail(self, error: Exception) -> None:
        """Whether it was written is not known: who asks again with the same id learns it."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Submissions:
    """The queue between the API and the leader's cycle."""

    def __init__(self, queue_max: int = SUBMISSIONS_MAX) -> None:
        self._queue: deque[Submission] = deque()
        self._max = queue_max
        self._of: Counter[Tenant] = Counter()
        self.arrived = asyncio.Event()
        self.is_open = False

    def __len__(self) -> int:
        return len(self._queue)

    def queued_of(self, tenant: Tenant) -> int:
        """How many of a tenant's wait."""
        return self._of[tenant]

    def offer(self, record: SandboxRecord, actor: str) -> Submission:
        """Queues a creation; raises ExhaustedError `submissions_exhausted` when the queue is full."""
        if len(self._queue) >= self._max:
            message = f"{self._max} creations wait to be placed, as many as may (limits.submissions_max)"
            raise ExhaustedError("submissions_exhausted", message, "send the same again in a few seconds")
        made = Submission(record, actor)
        self._queue.append(made)
        self._of[record.tenant] += 1
        self.arrived.set()
        return made

    def take(self, count: int) -> list[Submission]:
        """The first `count` that somebody still waits for; two of one id or name are not taken together."""
        taken: list[Submission] = []
        claimed: set[SandboxId | tuple[Tenant, str]] = set()
        while self._queue and len(taken) < count:
            one = self._queue.popleft()
            self._forget(one)
            if one.answer.done():
                continue
            claims: set[SandboxId | tuple[Tenant, str]] = {
                one.record.sandbox_id,
                (one.record.tenant, one.record.spec.name),
            }
            if claims & claimed:
                one.conclude(None)
                continue
            claimed |= claims
            taken.append(one)
        if not self._queue:
            self.arrived.clear()
        return taken

    def put_back(self, submissions: list[Submission]) -> None:
        """Those that were taken and not tried, in their order, before all others."""
        for one in reversed(submissions):
            self._queue.appendleft(one)
            self._of[one.record.tenant] += 1
        if self._queue:
            self.arrived.set()

    def open(self) -> None:
        """This scheduler leads: creations are placed as they come."""
        self.is_open = True

    def close(self) -> None:
        """It leads no more: those that wait are written without a placement."""
        self.is_open = False
        for one in self.take(len(self._queue)):
            one.conclude(None)

    def _forget(self, one: Submission) -> None:
        tenant = one.record.tenant
        self._of[tenant] -= 1
        if not self._of[tenant]:
            del self._of[tenant]
