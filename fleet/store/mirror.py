"""A copy of one prefix of the store in memory: list, then watch, and list again every RELIST_S whatever the watch said.

A watch is a hint and the listing the truth: a lost event costs at most RELIST_S. What the mirror shows is always the state of
one revision.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

import structlog

from fleet.errors import UnavailableError
from fleet.store.port import CompactedError, EventKind, KeyValue, Store, StoreUnavailableError, WatchEvent

RELIST_S = 30.0
RETRY_S = (0.2, 0.5, 1.0, 2.0)

log = structlog.get_logger()


class Mirror:
    """Everything under `prefix`, as of `revision`."""

    def __init__(self, store: Store, prefix: str, relist_s: float = RELIST_S) -> None:
        self._store = store
        self._prefix = prefix
        self._relist_s = relist_s
        self._entries: dict[str, KeyValue] = {}
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self.revision = 0
        self.is_fresh = False

    @property
    def entries(self) -> Mapping[str, KeyValue]:
        """The keys as of `revision`; a view that moves on, so read it without awaiting in between, or copy it."""
        return MappingProxyType(self._entries)

    def under(self, prefix: str) -> list[KeyValue]:
        """The entries whose key begins with `prefix`, in key order."""
        return [self._entries[key] for key in sorted(self._entries) if key.startswith(prefix)]

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change; it must return at once."""
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
        try:
            async with asyncio.timeout(timeout_s):
                while self.revision < revision:
                    await self.changed().wait()
        except TimeoutError as error:
            message = f"the store's revision {revision} was not seen within {timeout_s:.0f} s"
            raise UnavailableError("store_behind", message, "try again") from error

    async def run(self) -> None:
        """Follows the store until cancelled; while the store is away the last state stays and `is_fresh` is False."""
        failures = 0
        while True:
            try:
                await self._relist()
                failures = 0
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._relist_s):
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

    async def _relist(self) -> None:
        listing = await self._store.list_prefix(self._prefix)
        is_news = not self.is_fresh or {one.key: one for one in listing.entries} != self._entries
        self._entries = {entry.key: entry for entry in listing.entries}
        # The listing is the truth, also where it is younger than what was seen: a store that lost its data counts anew.
        self.revision = listing.revision
        self._advance(listing.revision, is_news=is_news)
        self.is_fresh = True

    async def _follow(self) -> None:
        async with self._store.watch(self._prefix, self.revision + 1) as batches:
            async for batch in _whole(batches):
                for event in batch:
                    self._take(event)
                self._advance(batch[-1].mod_revision, is_news=True)

    def _take(self, event: WatchEvent) -> None:
        if event.kind is EventKind.DELETE:
            self._entries.pop(event.key, None)
            return
        old = self._entries.get(event.key)
        created = old.create_revision if old else event.mod_revision
        self._entries[event.key] = KeyValue(event.key, event.value, created, event.mod_revision)

    def _advance(self, revision: int, *, is_news: bool) -> None:
        self.revision = max(self.revision, revision)
        if is_news:
            self.wake()
            for listener in self._listeners:
                listener()


async def _whole(batches: AsyncIterator[Sequence[WatchEvent]]) -> AsyncIterator[Sequence[WatchEvent]]:
    async for batch in batches:
        if batch:
            yield batch
