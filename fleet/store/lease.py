"""Keeps one lease alive, and knows by its own clock when it can no longer be sure of it.

The server's count starts when a renewal arrives, ours when it was sent: the keeper gives a lease up before the server does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import structlog

from fleet.errors import BedplateError, ConflictError
from fleet.store.port import Store, StoreUnavailableError

# Three tries fit into a lease's life.
RENEWALS_PER_TTL = 3
# A lease of 2 s is tried for again every tenth of a second, one of 15 s every 0.75 s.
RETRIES_PER_TTL, RETRY_S_MAX = 20, 1.0
REVOKE_TIMEOUT_S = 2.0

log = structlog.get_logger()


class Pause(Protocol):
    """Waits for seconds; a simulation gives one that waits on its virtual clock."""

    async def __call__(self, delay_s: float, /) -> None: ...


class LeaseKeeper:
    """One lease at a time: granted, handed to `on_granted` (which puts the keys under it), renewed; a new one when it is lost.

    `on_sure` is told until when, by `clock`, the lease with its keys is alive for sure, whenever that moves.
    """

    def __init__(
        self,
        store: Store,
        ttl_s: float,
        on_granted: Callable[[int], Awaitable[None]],
        clock: Callable[[], float],
        pause: Pause = asyncio.sleep,
        *,
        on_sure: Callable[[float], None] = lambda _until_s: None,
    ) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._retry_s = min(ttl_s / RETRIES_PER_TTL, RETRY_S_MAX)
        self._on_granted = on_granted
        self._clock = clock
        self._pause = pause
        self._on_sure = on_sure
        self._lease_id = 0
        self._sure_until_s = 0.0

    @property
    def is_held(self) -> bool:
        """Whether the lease is alive for sure."""
        return self._lease_id != 0 and self._clock() < self._sure_until_s

    async def run(self) -> None:
        """Holds a lease until cancelled, then revokes it."""
        try:
            while True:
                try:
                    await self._hold_one()
                except (StoreUnavailableError, ConflictError) as error:
                    log.warning("lease.failed", code=error.code, error=error.message)
                    await self._pause(self._retry_s)
        finally:
            await self._revoke()

    async def _hold_one(self) -> None:
        asked_at_s = self._clock()
        lease_id = await self._store.grant_lease(self._ttl_s)
        self._lease_id, self._sure_until_s = lease_id, asked_at_s + self._ttl_s
        await self._on_granted(lease_id)
        self._on_sure(self._sure_until_s)
        while await self._renew(lease_id):
            await self._pause(self._ttl_s / RENEWALS_PER_TTL)
        log.warning("lease.lost", lease_id=lease_id)
        self._lease_id = 0

    async def _renew(self, lease_id: int) -> bool:
        while True:
            asked_at_s = self._clock()
            try:
                left_s = await self._store.renew_lease(lease_id)
            except StoreUnavailableError:
                if self._clock() >= self._sure_until_s:
                    return False
                await self._pause(self._retry_s)
                continue
            self._sure_until_s = asked_at_s + left_s
            if left_s > 0:
                self._on_sure(self._sure_until_s)
            return left_s > 0

    async def _revoke(self) -> None:
        lease_id, self._lease_id = self._lease_id, 0
        if lease_id:
            with suppress(BedplateError, TimeoutError):
                async with asyncio.timeout(REVOKE_TIMEOUT_S):
                    await self._store.revoke_lease(lease_id)
