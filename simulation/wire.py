"""A process's way to the store: every call takes time, may be lost before or after it took effect, and watches break and stall."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

from fleet.store.memory import MemoryStore
from fleet.store.port import (
    Committed,
    KeyValue,
    Listing,
    StoreUnavailableError,
    Unmoved,
    Watch,
    WatchEvent,
    Write,
)

T = TypeVar("T")

# What a client waits for an answer, and after how long of silence it gives a connection up: as fleet.store.etcd does.
CALL_TIMEOUT_S = 5.0
KEEPALIVE_S = 8.0


@dataclass(slots=True)
class Way:
    """How the way between one process and the store is: `up` carries requests, `down` answers and events."""

    chance: Random
    is_up_cut: bool = False
    is_down_cut: bool = False
    latency_s: float = 0.002
    # Of a thousand calls so many are lost on the way, half of them after they took effect; of events so many stall or come twice.
    loss_permille: int = 0
    broken: list["asyncio.Future[None]"] = field(default_factory=list)
    # Called once, when the next transaction is on its way.
    on_commit: Callable[[], None] | None = None

    def delay_s(self) -> float:
        """How long one way takes: mostly the latency, now and then much more."""
        return self.latency_s * self.chance.choice((0.5, 1, 1, 1, 2, 3, 20))

    def is_lost(self) -> bool:
        """Whether this message is."""
        return self.chance.randrange(1000) < self.loss_permille

    def break_watches(self) -> None:
        """Every open watch ends with an error."""
        waiting, self.broken = self.broken, []
        for one in waiting:
            if not one.done():
                one.set_result(None)


class Wire:
    """fleet.store.port.Store over a Way; `who` is told of by the store's own listeners."""

    def __init__(self, store: MemoryStore, way: Way, who: Callable[[], None]) -> None:
        self._store = store
        self._way = way
        self._who = who

    async def get(self, key: str) -> KeyValue | None:
        """The key now."""
        return await self._call(lambda: self._store.get(key))

    async def list_prefix(self, prefix: str, revision: int = 0) -> Listing:
        """Every key under the prefix."""
        return await self._call(
            lambda: self._store.list_prefix(prefix, revision) if revision else self._store.list_prefix(prefix)
        )

    async def transact(self, conditions: Sequence[Unmoved], writes: Sequence[Write]) -> Committed:
        """All of the writes, or none."""
        struck, self._way.on_commit = self._way.on_commit, None
        if struck is not None:
            struck()
        return await self._call(lambda: self._store.transact(conditions, writes))

    def watch(self, prefix: str, from_revision: int) -> Watch:
        """Changes as they come through."""
        return self._open_watch(prefix, from_revision)

    async def grant_lease(self, ttl_s: float) -> int:
        """A new lease."""
        return await self._call(lambda: self._store.grant_lease(ttl_s))

    async def renew_lease(self, lease_id: int) -> float:
        """Renews."""
        return await self._call(lambda: self._store.renew_lease(lease_id))

    async def revoke_lease(self, lease_id: int) -> None:
        """Ends a lease."""
        await self._call(lambda: self._store.revoke_lease(lease_id))

    async def compact(self, revision: int) -> None:
        """Forgets history."""
        await self._call(lambda: self._store.compact(revision))

    async def close(self) -> None:
        """Nothing is held open."""

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        way = self._way
        await asyncio.sleep(way.delay_s())
        if way.is_up_cut or way.is_lost():
            await self._give_up()
        self._who()
        answer = await call()
        await asyncio.sleep(way.delay_s())
        if way.is_down_cut or way.is_lost():
            await self._give_up()
        return answer

    async def _give_up(self) -> None:
        await asyncio.sleep(CALL_TIMEOUT_S)
        raise StoreUnavailableError("store_unavailable", "the store did not answer", "try again")

    @asynccontextmanager
    async def _open_watch(self, prefix: str, from_revision: int) -> AsyncIterator[AsyncIterator[Sequence[WatchEvent]]]:
        if self._way.is_up_cut:
            await self._give_up()
        async with self._store.watch(prefix, from_revision) as batches:
            yield self._relay(batches)

    async def _relay(self, batches: AsyncIterator[Sequence[WatchEvent]]) -> AsyncIterator[Sequence[WatchEvent]]:
        way = self._way
        while True:
            broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            way.broken.append(broken)
            coming = asyncio.ensure_future(_next(batches))
            either: set[asyncio.Future[Any]] = {coming, broken}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if broken.done():
                coming.cancel()
                raise StoreUnavailableError("store_unavailable", "the watch broke", "resume")
            way.broken.remove(broken)
            batch = coming.result()
            await asyncio.sleep(way.delay_s())
            if way.is_down_cut or way.is_lost():
                await asyncio.sleep(KEEPALIVE_S)
                raise StoreUnavailableError("store_unavailable", "the watch was silent", "resume")
            yield batch
            if way.loss_permille and way.chance.randrange(100) == 0:
                yield batch


async def _next(batches: AsyncIterator[Sequence[WatchEvent]]) -> Sequence[WatchEvent]:
    return await anext(batches)
