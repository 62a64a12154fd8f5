"""A copy of one prefix of the store in memory: list, then watch, and list again every RELIST_S whatever the watch said.

A watch is a hint and the listing the truth: a lost event costs at most RELIST_S, or LISTING_SHARE times what a listing takes.
What the mirror shows is always the state of one revision.
"""

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

import structlog

from fleet.errors import UnavailableError
from fleet.store.port import CompactedError, EventKind, KeyValue, Store, StoreUnavailableError, WatchEvent

RELIST_S = 30.0
# A listing of half a million keys takes seconds of the event loop: it may have a fiftieth of it.
LISTING_SHARE = 50.0
RETRY_S = (0.2, 0.5, 1.0, 2.0)

# What each changed key held before; what it holds now is in the mirror.
Changes = Mapping[str, KeyValue | None]

log = structlog.get_logger()


class Mirror:
    """Everything under `prefix`, as of `revision`."""

    def __init__(self, store: Store, prefix: str, relist_s: float = RELIST_S) -> None:
        self._store = store
        self._prefix = prefix
        self._relist_s = relist_s
        self._entries: dict[str, KeyValue] = {}
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[Changes], None]] = []
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._waited = 0
        self.revision = 0
        self.is_fresh = False

    @property
    def entries(self) -> Mapping[str, KeyValue]:
        """The keys as of `revision`; a view that moves on, so read it without awaiting in between, or copy it."""
        return MappingProxyType(self._entries)

    def under(self, prefix: str) -> list[KeyValue]:
        """The entries whose key begins with `prefix`, in key order."""
        return [self._entries[key] for key in sorted(self._entries) if key.startswith(prefix)]

    def on_change(self, listener: Callable[[Changes], None]) -> None:
        """Call `listener` after every change with the keys that changed and what they held before; it must return at once."""
        self._listeners.append(listener)

    def changed(self) -> asyncio.Event:
        """The event of the next change, also of `is_fresh`: take it, look, then wait for it."""
        return self._changed

    def wake(self) -> None:
        """Whoever waits for a change looks again, though nothing may have changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for(self, revision: int, timeout_s: float) -> None:
        """Returns when the mirror has seen `revision`; raises UnavailableError `store_behind` after `timeout_s`."""
        if self.revision >= revision:
            return
        seen = asyncio.get_running_loop().create_future()
        self._waited += 1
        heapq.heappush(self._waiters, (revision, self._waited, seen))
        try:
            async with asyncio.timeout(timeout_s):
                await seen
        except TimeoutError as error:
            message = f"the store's revision {revision} was not seen within {timeout_s:.0f} s"
            raise UnavailableError("store_behind", message, "try again") from error

    async def see(self, key: str, timeout_s: float) -> None:
        """Returns when the mirror has seen `key` as the store has it now; raises UnavailableError."""
        found = await self._store.get(key)
        if found is not None:
            await self.wait_for(found.mod_revision, timeout_s)

    async def catch_up(self) -> None:
        """Returns when all that was put under `prefix` before this call is seen; raises StoreUnavailableError."""
        listing = await self._store.list_prefix(self._prefix)
        newest = max((entry.mod_revision for entry in listing.entries), default=0)
        while self.revision < newest or not self.is_fresh:
            await self.changed().wait()

    async def run(self) -> None:
        """Follows the store until cancelled; while the store is away the last state stays and `is_fresh` is False."""
        failures = 0
        while True:
            try:
                followed_s = await self._relist()
                failures = 0
                with suppress(TimeoutError):
                    async with asyncio.timeout(followed_s):
                        await self._follow()
            except CompactedError:
                log.info("watch.compacted", prefix=self._prefix, revision=self.revision)
            except StoreUnavailableError as error:
                failures += 1
                if failures == 1:
                    # One member of the store has gone, as it seems: the listing asks the others.
                    continue
                if self.is_fresh:
                    self.is_fresh = False
                    self.wake()
                log.warning("store.unreached", prefix=self._prefix, error=error.message)
                await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S)) - 1])

    async def _relist(self) -> float:
        """Lists all; tells for how many seconds the watch is followed before it is listed again."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        listing = await self._store.list_prefix(self._prefix)
        entries, old = {entry.key: entry for entry in listing.entries}, self._entries
        changes = {entry.key: old.get(entry.key) for entry in listing.entries if _differs(old.get(entry.key), entry)}
        if len(old) + len(changes) > len(entries):
            changes |= {key: entry for key, entry in old.items() if key not in entries}
        is_news = not self.is_fresh or bool(changes)
        self._entries = entries
        # The listing is the truth, also where it is younger than what was seen: a store that lost its data counts anew.
        self.revision = listing.revision
        self.is_fresh = True
        self._advance(listing.revision, changes, is_news=is_news)
        return max(self._relist_s, LISTING_SHARE * (loop.time() - started))

    async def _follow(self) -> None:
        async with self._store.watch(self._prefix, self.revision + 1) as batches:
            async for batch in _whole(batches):
                changes: dict[str, KeyValue | None] = {}
                for event in batch:
                    changes.setdefault(event.key, self._entries.get(event.key))
                    self._take(event)
                self._advance(batch[-1].mod_revision, changes, is_news=True)

    def _take(self, event: WatchEvent) -> None:
        if event.kind is EventKind.DELETE:
            self._entries.pop(event.key, None)
            return
        old = self._entries.get(event.key)
        created = old.create_revision if old else event.mod_revision
        self._entries[event.key] = KeyValue(event.key, event.value, created, event.mod_revision)

    def _advance(self, revision: int, changes: Changes, *, is_news: bool) -> None:
        self.revision = max(self.revision, revision)
        if is_news:
            for listener in self._listeners:
                listener(changes)
            self.wake()
        while self._waiters and self._waiters[0][0] <= self.revision:
            _, _, seen = heapq.heappop(self._waiters)
            if not seen.done():
                seen.set_result(None)


def _differs(old: KeyValue | None, new: KeyValue) -> bool:
    # A watch does not tell leases and revisions of creation as a listing does, and nobody needs them of a mirror.
    return old is None or old.mod_revision != new.mod_revision or old.value != new.value


async def _whole(batches: AsyncIterator[Sequence[WatchEvent]]) -> AsyncIterator[Sequence[WatchEvent]]:
    async for batch in batches:
        if batch:
            yield batch
