"""Leadership: whoever puts the key under its lease leads until the lease ends. An optimisation: the fence is the safety.

waiting -- key absent, put under my lease --> leading -- lease lost, or resigned --> waiting
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from fleet.store.lease import LeaseKeeper
from fleet.store.port import CompactedError, EventKind, Put, Store, StoreUnavailableError, Unmoved

# A store that is away, or elects a leader itself, is asked again so soon that a vacancy is not left waiting for it.
RETRY_S = 0.2
# A vacancy that the watch missed is found by looking again, and a silent member of the store is found by asking.
LOOK_INTERVAL_S = 1.0

log = structlog.get_logger()


class Election:
    """One candidate for the leadership that `key` stands for."""

    def __init__(self, store: Store, key: str, name: str, ttl_s: float, clock: Callable[[], float]) -> None:
        self._store = store
        self._key = key
        self._name = name
        self._ttl_s = ttl_s
        self._clock = clock
        self._keeper: LeaseKeeper | None = None
        self._revision = 0
        self._won = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def on_won(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever this candidate has won; it must return at once."""
        self._listeners.append(listener)

    def fence(self) -> Unmoved | None:
        """The condition that this candidate still leads, for every transaction it writes; None while it does not lead."""
        if self._keeper is None or not self._keeper.is_held or not self._revision:
            return None
        return Unmoved(self._key, self._revision)

    async def wait_until_leading(self) -> None:
        """Returns when this candidate has won."""
        await self._won.wait()

    async def run(self) -> None:
        """Stands for election until cancelled, then resigns."""
        while True:
            try:
                await self._wait_for_vacancy()
                await self._lead()
            except (StoreUnavailableError, CompactedError):
                await asyncio.sleep(RETRY_S)

    async def _wait_for_vacancy(self) -> None:
        while (found := await self._store.get(self._key)) is not None:
            with suppress(TimeoutError):
                async with (
                    asyncio.timeout(LOOK_INTERVAL_S),
                    self._store.watch(self._key, found.mod_revision + 1) as batches,
                ):
                    async for batch in batches:
                        if any(event.kind is EventKind.DELETE and event.key == self._key for event in batch):
                            return

    async def _lead(self) -> None:
        lost, began_s = asyncio.Event(), self._clock()

        async def campaign(lease_id: int) -> None:
            if self._revision:
                # A second lease: the first was lost, and with it this term.
                self._revision = 0
                lost.set()
                return
            committed = await self._store.transact(
                [Unmoved(self._key, 0)], [Put(self._key, self._name.encode(), lease_id)]
            )
            if committed.is_committed:
                self._revision = committed.revision
                self._won.set()
                for listener in self._listeners:
                    listener()
                duration_ms = round((self._clock() - began_s) * 1000, 1)
                log.info("leadership.won", key=self._key, name=self._name, duration_ms=duration_ms)
            else:
                lost.set()

        self._keeper = LeaseKeeper(self._store, self._ttl_s, campaign, self._clock)
        keeper = asyncio.create_task(self._keeper.run())
        # A keeper that ends for whatever reason ends the term: nobody may wait for a lease that is kept no more.
        keeper.add_done_callback(lambda _: lost.set())
        try:
            await lost.wait()
        finally:
            self._revision = 0
            self._won.clear()
            keeper.cancel()
            # `await keeper` would raise its end as ours, and to suppress that would swallow a cancellation of our own.
            await asyncio.wait({keeper})
            log.info("leadership.ended", key=self._key, name=self._name)
