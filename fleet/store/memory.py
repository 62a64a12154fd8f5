"""The store in memory: etcd's semantics without etcd, for simulations and fast tests. One process, one event loop.

Time is the clock it is given: leases end when the clock has passed them and anybody looks, or `expire_leases` is called.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fleet.errors import ConflictError
from fleet.store.port import (
    Committed,
    CompactedError,
    Delete,
    EventKind,
    KeyValue,
    Listing,
    StoreUnavailableError,
    Unmoved,
    Watch,
    WatchEvent,
    Write,
    check_transaction,
)


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    ends_at_s: float


class MemoryStore:
    """fleet.store.port.Store on dictionaries; `is_reachable` set to False makes every call fail as etcd away would."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._revision = 1
        self._compacted = 0
        self._keys: dict[str, KeyValue] = {}
        # What the keys were before the events of the history.
        self._base: dict[str, KeyValue] = {}
        self._history: list[WatchEvent] = []
        self._leases: dict[int, _Lease] = {}
        self._last_lease = 0
        self._changed = asyncio.Event()
        self._is_reachable = True

    @property
    def is_reachable(self) -> bool:
        """Whether calls are answered; set to False, open watches break as well."""
        return self._is_reachable

    @is_reachable.setter
    def is_reachable(self, value: bool) -> None:
        self._is_reachable = value
        self._wake()

    async def get(self, key: str) -> KeyValue | None:
        """The key now, or None."""
        self._enter()
        return self._keys.get(key)

    async def list_prefix(self, prefix: str, revision: int = 0) -> Listing:
        """Every key under `prefix` in key order, now or as of `revision`."""
        self._enter()
        if not revision:
            found = tuple(self._keys[key] for key in sorted(self._keys) if key.startswith(prefix))
            return Listing(self._revision, found)
        if not self._compacted <= revision <= self._revision:
            raise CompactedError("compacted", f"revision {revision} is compacted, or not there yet", "list again")
        then = {key: entry for key, entry in self._base.items() if key.startswith(prefix)}
        for event in self._history:
            if event.mod_revision <= revision and event.key.startswith(prefix):
                _apply(then, event)
        return Listing(revision, tuple(then[key] for key in sorted(then)))

    async def transact(self, conditions: Sequence[Unmoved], writes: Sequence[Write]) -> Committed:
        """All writes if every condition holds; raises ConflictError `lease_gone` when a write's lease has ended."""
        check_transaction(conditions, writes)
        self._enter()
        if any(self._mod_revision(one.key) != one.mod_revision for one in conditions):
            return Committed(is_committed=False, revision=self._revision)
        for write in writes:
            if not isinstance(write, Delete) and write.lease_id and write.lease_id not in self._leases:
                raise ConflictError("lease_gone", "the lease has ended", "take a new one")
        self._write(writes)
        return Committed(is_committed=True, revision=self._revision)

    def watch(self, prefix: str, from_revision: int) -> Watch:
        """Changes under `prefix` since `from_revision`."""
        return self._open_watch(prefix, from_revision)

    async def grant_lease(self, ttl_s: float) -> int:
        """A new lease's id."""
        self._enter()
        self._last_lease += 1
        self._leases[self._last_lease] = _Lease(ttl_s, self._clock() + ttl_s)
        return self._last_lease

    async def renew_lease(self, lease_id: int) -> float:
        """Seconds the lease has to live now; 0.0 when it is gone."""
        self._enter()
        lease = self._leases.get(lease_id)
        if lease is None:
            return 0.0
        lease.ends_at_s = self._clock() + lease.ttl_s
        return lease.ttl_s

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease and delete its keys."""
        self._enter()
        self._end_lease(lease_id)

    async def compact(self, revision: int) -> None:
        """Forget the history before `revision`."""
        self._enter()
        self._compacted = max(self._compacted, revision)
        for event in self._history:
            if event.mod_revision < revision:
                _apply(self._base, event)
        self._history = [event for event in self._history if event.mod_revision >= revision]
        self._wake()

    async def close(self) -> None:
        """Nothing is held open."""

    def expire_leases(self) -> None:
        """End every lease whose time is over by the clock."""
        now = self._clock()
        for lease_id in [id_ for id_, lease in self._leases.items() if lease.ends_at_s <= now]:
            self._end_lease(lease_id)

    def _enter(self) -> None:
        if not self._is_reachable:
            raise StoreUnavailableError("store_unavailable", "the store is away", "try again")
        self.expire_leases()

    def _mod_revision(self, key: str) -> int:
        found = self._keys.get(key)
        return found.mod_revision if found else 0

    def _end_lease(self, lease_id: int) -> None:
        if self._leases.pop(lease_id, None) is not None:
            self._write([Delete(key) for key, found in self._keys.items() if found.lease_id == lease_id])

    def _write(self, writes: Sequence[Write]) -> None:
        real = [write for write in writes if not isinstance(write, Delete) or write.key in self._keys]
        if not real:
            return
        self._revision += 1
        for write in real:
            self._write_one(write)
        self._wake()

    def _write_one(self, write: Write) -> None:
        if isinstance(write, Delete):
            del self._keys[write.key]
            self._history.append(WatchEvent(EventKind.DELETE, write.key, b"", self._revision))
            return
        old = self._keys.get(write.key)
        created = old.create_revision if old else self._revision
        self._keys[write.key] = KeyValue(write.key, write.value, created, self._revision, write.lease_id)
        self._history.append(WatchEvent(EventKind.PUT, write.key, write.value, self._revision))

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def _open_watch(self, prefix: str, from_revision: int) -> AsyncIterator[AsyncIterator[Sequence[WatchEvent]]]:
        self._enter()
        yield self._batches(prefix, from_revision)

    async def _batches(self, prefix: str, from_revision: int) -> AsyncIterator[Sequence[WatchEvent]]:
        revision = from_revision or self._revision + 1
        while True:
            changed = self._changed
            self._enter()
            if revision < self._compacted:
                raise CompactedError("compacted", f"revisions before {self._compacted} are compacted", "list again")
            batch = [
                event for event in self._history if event.mod_revision >= revision and event.key.startswith(prefix)
            ]
            revision = self._revision + 1
            if batch:
                yield batch
            else:
                await changed.wait()


def _apply(keys: dict[str, KeyValue], event: WatchEvent) -> None:
    old = keys.pop(event.key, None)
    if event.kind is EventKind.PUT:
        created = old.create_revision if old else event.mod_revision
        keys[event.key] = KeyValue(event.key, event.value, created, event.mod_revision)
