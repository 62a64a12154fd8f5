"""Publishes what this host knows of its sandboxes: one status key each, written when it differs and fenced by the host's lease."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace

import structlog

from fleet.codec import decode, encode
from fleet.errors import BedplateError, InvalidSpecError
from fleet.model.host import Accelerator
from fleet.model.ids import HostId, SandboxId
from fleet.model.sandbox import Goal, Phase, SandboxStatus, StageName
from fleet.store.keyspace import host_statuses, status_key
from fleet.store.lease import Pause
from fleet.store.port import Delete, KeyValue, Put, Store, Unmoved, Write
from hostd.clock import now_ms
from hostd.orders import Orders
from hostd.reconcile.loop import Reconciler
from hostd.reconcile.progress import current_run, is_over, render_status

# A status that has changed is at most this old; what came in between is told with it.
INTERVAL_S = 0.3
# Output counters move all the time. Alone they are told this often: each write is one of etcd's and a look of the scheduler's.
COUNTERS_INTERVAL_MS = 5_000
RETRY_S = 2.0
# A status of the most agents, each with its reason, is 32 KiB; so many stay below etcd's limit of 1.5 MiB in one request.
WRITES_MAX = 32

log = structlog.get_logger()


class Publisher:
    """Keeps the statuses in the store equal to what the orders folder and the last pass say."""

    def __init__(
        self,
        host_id: HostId,
        store: Store,
        orders: Orders,
        reconciler: Reconciler,
        accelerator: Accelerator,
        *,
        pause: Pause = asyncio.sleep,
        now_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._host_id = host_id
        self._store = store
        self._orders = orders
        self._reconciler = reconciler
        self._accelerator = accelerator
        self._pause = pause
        self._now_ms = now_ms
        self._published: Mapping[SandboxId, SandboxStatus | None] | None = None
        self._told: Callable[[SandboxId], None] = lambda _sandbox_id: None
        self._nudged = asyncio.Event()

    def on_told(self, listener: Callable[[SandboxId], None]) -> None:
        """Call `listener` with each sandbox whose status the store has taken."""
        self._told = listener

    def has_told_start(self, sandbox_id: SandboxId) -> bool:
        """Whether the store has a status which says that the domain of the present run has started."""
        status, order = (self._published or {}).get(sandbox_id), self._orders.orders.get(sandbox_id)
        if status is None or order is None or status.run < order.run or status.placement < order.placement:
            return False
        return any(stage.name == StageName.DOMAIN_STARTED for stage in status.stages)

    def nudge(self) -> None:
        """Something may have changed."""
        self._nudged.set()

    async def recall(self) -> dict[SandboxId, SandboxStatus | None]:
        """What this host has published of its sandboxes, None for what cannot be read; raises StoreUnavailableError."""
        listing = await self._store.list_prefix(host_statuses(self._host_id))
        return {_id_of(entry): _decode(entry) for entry in listing.entries}

    async def run(self, fence: Callable[[], Unmoved | None]) -> None:
        """Publishes until cancelled; `fence` is the condition that this host still holds its lease, None while it does not."""
        while True:
            await self._nudged.wait()
            self._nudged.clear()
            delay_s = INTERVAL_S
            try:
                held = fence()
                if held is not None:
                    await self._publish(held)
            except BedplateError as error:
                log.warning("status.unpublished", code=error.code, error=error.message)
                self._published = None
                self._nudged.set()
                delay_s = RETRY_S
            await self._pause(delay_s)

    async def _publish(self, held: Unmoved) -> None:
        if self._published is None:
            self._published = await self.recall()
        current = {status.sandbox_id: status for status in self._render_all()}
        changed = [status for id_, status in current.items() if _is_news(status, self._published.get(id_))]
        gone = [sandbox_id for sandbox_id in self._published if sandbox_id not in current]
        writes: list[Write] = [Put(self._key(status.sandbox_id), encode(status)) for status in changed]
        writes += [Delete(self._key(sandbox_id)) for sandbox_id in gone]
        for start in range(0, len(writes), WRITES_MAX):
            committed = await self._store.transact([held], writes[start : start + WRITES_MAX])
            if not committed.is_committed:
                # The lease is not what it was: whoever holds it now lists first, then writes.
                self._published = None
                self._nudged.set()
                return
        before = self._published
        self._published = {id_: before[id_] for id_ in before if id_ in current}
        for status in changed:
            self._published[status.sandbox_id] = status
            self._told(status.sandbox_id)
            if _outline(status) != _outline(before.get(status.sandbox_id)):
                phase, generation = status.phase, status.generation
                log.info("status.published", sandbox_id=status.sandbox_id, phase=phase, generation=generation)

    def _render_all(self) -> list[SandboxStatus]:
        return [self._render(sandbox_id) for sandbox_id in sorted(self._orders.orders)]

    def _render(self, sandbox_id: SandboxId) -> SandboxStatus:
        order, progress = self._orders.orders[sandbox_id], self._orders.progress.get(sandbox_id)
        released, now_ms = self._reconciler.is_released(sandbox_id), self._now_ms()
        told, placement = (self._published or {}).get(sandbox_id), max(1, order.placement)
        if progress is None:
            is_gone = released and order.goal is Goal.REMOVE
            phase = Phase.REMOVED if is_gone else Phase.REMOVING
            released = is_gone or _was_released(told, order.run, placement)
            gone = SandboxStatus(sandbox_id, self._host_id, order.generation, phase, released=released, at_ms=now_ms)
            return replace(gone, run=order.run, placement=placement)
        run = current_run(progress, order)
        status = render_status(
            order,
            progress,
            accelerator=self._accelerator,
            is_released=(released and is_over(run, order.goal)) or _was_released(told, run.run, placement),
            now_ms=now_ms,
        )
        trouble = self._reconciler.trouble(sandbox_id)
        return status if status.reason or trouble is None else replace(status, reason=trouble)

    def _key(self, sandbox_id: SandboxId) -> str:
        return status_key(self._host_id, sandbox_id)


def _was_released(told: SandboxStatus | None, run: int, placement: int) -> bool:
    """Whether this run was told to be released: that stays true, also while a worker takes its disk away."""
    return told is not None and told.released and (told.run, told.placement) == (run, placement)


def _id_of(entry: KeyValue) -> SandboxId:
    return SandboxId(entry.key.rsplit("/", 1)[-1])


def _decode(entry: KeyValue) -> SandboxStatus | None:
    try:
        return decode(SandboxStatus, entry.value)
    except InvalidSpecError:
        # Of another version, or broken: it is written anew.
        return None


def _is_news(status: SandboxStatus, known: SandboxStatus | None) -> bool:
    if known is None or _without_counters(status) != _without_counters(known):
        return True
    has_more = status.agents != known.agents
    return has_more and status.at_ms - known.at_ms >= COUNTERS_INTERVAL_MS


def _without_counters(status: SandboxStatus) -> SandboxStatus:
    agents = tuple(replace(agent, output_bytes=0) for agent in status.agents)
    return replace(status, agents=agents, at_ms=0)


def _outline(status: SandboxStatus | None) -> tuple[object, ...]:
    return () if status is None else (status.phase, status.generation, status.released)
