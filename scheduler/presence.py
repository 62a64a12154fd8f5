"""Tells the fleet that this scheduler serves, and since when it leads: a key of its own under a lease of its own."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import structlog

from fleet.codec import encode
from fleet.errors import BedplateError
from fleet.model.scheduler import SchedulerRecord
from fleet.store.keyspace import scheduler_key
from fleet.store.lease import LeaseKeeper
from fleet.store.port import Put, Store

# Only operators read it: seconds more or less are nothing to them, and etcd has fewer renewals.
TTL_S = 10.0

log = structlog.get_logger()


class Presence:
    """One scheduler's record in the store, for as long as `run` runs."""

    def __init__(
        self, store: Store, record: SchedulerRecord, clock: Callable[[], float], now_ms: Callable[[], int]
    ) -> None:
        self._store = store
        self._record = record
        self._now_ms = now_ms
        self._lease_id = 0
        self._led = asyncio.Event()
        self._keeper = LeaseKeeper(store, TTL_S, self._put, clock)

    def lead(self) -> None:
        """A term begins now."""
        self._record = replace(self._record, leading_since_ms=self._now_ms())
        self._led.set()

    async def run(self) -> None:
        """Keeps the record until cancelled, then takes it away."""
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._keeper.run())
            parts.create_task(self._tell_terms())

    async def _put(self, lease_id: int) -> None:
        self._lease_id = lease_id
        await self._store.transact([], [Put(scheduler_key(self._record.name), encode(self._record), lease_id)])

    async def _tell_terms(self) -> None:
        while True:
            await self._led.wait()
            self._led.clear()
            if self._keeper.is_held:
                try:
                    await self._put(self._lease_id)
                except BedplateError as error:
                    # The next lease, or the next term, carries it.
                    log.warning("presence.untold", code=error.code, error=error.message)
