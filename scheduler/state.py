"""What the scheduler knows: its mirror of the store, decoded once per change of a key, as snapshots. Decides nothing.

A value that cannot be read is told in one log line and left out; nothing in the store can stop the scheduler.
"""

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import structlog

from fleet.codec import decode
from fleet.errors import BedplateError, UnavailableError
from fleet.model.assignment import Assignment, Refusal
from fleet.model.host import HostCordon, HostRecord, Reservation
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import SandboxRecord, SandboxStatus
from fleet.store.keyspace import (
    ALIVE,
    ASSIGNMENTS,
    CORDONS,
    HOSTS,
    NAMES,
    RECORDS,
    REFUSALS,
    RESERVATIONS,
    SOURCES,
    STATUSES,
)
from fleet.store.mirror import Mirror
from fleet.store.port import KeyValue
from scheduler.placement.snapshot import Snapshot

T = TypeVar("T")

# A write is in the mirror within milliseconds; longer than this, and the caller is told instead of left waiting.
SEEN_TIMEOUT_S = 5.0

_KINDS: Mapping[str, type] = {
    RECORDS: SandboxRecord,
    ASSIGNMENTS: Assignment,
    STATUSES: SandboxStatus,
    REFUSALS: Refusal,
    HOSTS: HostRecord,
    RESERVATIONS: Reservation,
    CORDONS: HostCordon,
}

log = structlog.get_logger()


class FleetState:
    """The newest snapshot of `mirror`, which someone else runs."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._decoded: dict[str, tuple[int, Any]] = {}
        self._snapshot: Snapshot | None = None
        mirror.on_change(self._forget)

    def snapshot(self) -> Snapshot:
        """The store as last seen, also while it is away."""
        if self._snapshot is None or self._snapshot.revision != self._mirror.revision:
            self._snapshot = self._read()
        return self._snapshot

    def fresh(self) -> Snapshot:
        """The store as it is now; raises UnavailableError `store_unavailable` while it is away."""
        if not self._mirror.is_fresh:
            raise UnavailableError(
                "store_unavailable", "the scheduler cannot reach its store", "try again; check etcd and the way to it"
            )
        return self.snapshot()

    @property
    def is_fresh(self) -> bool:
        """Whether the store is followed now."""
        return self._mirror.is_fresh

    def changed(self) -> asyncio.Event:
        """The event of the next change, also of `is_fresh`: take it, look, then wait for it."""
        return self._mirror.changed()

    async def seen(self, revision: int) -> Snapshot:
        """The snapshot once it has `revision`; raises UnavailableError `store_behind` after SEEN_TIMEOUT_S."""
        await self._mirror.wait_for(revision, SEEN_TIMEOUT_S)
        return self.snapshot()

    def _forget(self) -> None:
        self._snapshot = None

    def _read(self) -> Snapshot:
        entries = self._mirror.entries
        self._decoded = {key: self._decode(entry) for key, entry in entries.items()}
        unreadable = [key for key, (_, value) in self._decoded.items() if value is None]
        return Snapshot(
            revision=self._mirror.revision,
            records={one.sandbox_id: one for one in self._all(RECORDS, SandboxRecord)},
            names={
                (Tenant(tenant), name): SandboxId(entries[key].value.decode("utf-8", "replace"))
                for key, (tenant, name) in _segments(entries, NAMES, 2)
            },
            assignments={one.sandbox_id: one for one in self._all(ASSIGNMENTS, Assignment)},
            statuses={(one.host_id, one.sandbox_id): one for one in self._all(STATUSES, SandboxStatus)},
            refusals={one.sandbox_id: one for one in self._all(REFUSALS, Refusal)},
            hosts={one.host_id: one for one in self._all(HOSTS, HostRecord)},
            alive=frozenset(HostId(host_id) for _, (host_id,) in _segments(entries, ALIVE, 1)),
            # A host is cordoned by the key: what cannot be read of it takes the reason away, not the cordon.
            cordons={
                host_id: self._decoded[key][1] or HostCordon(host_id, "", 0)
                for key, host_id in ((key, HostId(name)) for key, (name,) in _segments(entries, CORDONS, 1))
            },
            reservations={one.host_id: one for one in self._all(RESERVATIONS, Reservation)},
            sources=_sources(entries),
            opaque_sandboxes=frozenset(
                SandboxId(sandbox_id)
                for prefix in (RECORDS, ASSIGNMENTS)
                for _, (_, sandbox_id) in _segments(unreadable, prefix, 2)
            ),
            opaque_hosts=frozenset(HostId(host_id) for _, (host_id, _) in _segments(unreadable, ASSIGNMENTS, 2)),
            mod_revisions={key: entry.mod_revision for key, entry in entries.items()},
        )

    def _decode(self, entry: KeyValue) -> tuple[int, Any]:
        known = self._decoded.get(entry.key)
        if known is not None and known[0] == entry.mod_revision:
            return known
        kind = next((kind for prefix, kind in _KINDS.items() if entry.key.startswith(prefix)), None)
        if kind is None:
            return entry.mod_revision, entry.value
        try:
            return entry.mod_revision, decode(kind, entry.value)
        except BedplateError as error:
            log.warning("value.unreadable", key=entry.key, code=error.code, error=error.message)
            return entry.mod_revision, None

    def _all(self, prefix: str, kind: type[T]) -> Iterator[T]:
        for key, (_, value) in self._decoded.items():
            if key.startswith(prefix) and isinstance(value, kind):
                yield value


def _segments(keys: Any, prefix: str, count: int) -> Iterator[tuple[str, list[str]]]:
    """The keys under `prefix` that have `count` segments after it, with these."""
    for key in keys:
        parts = key.removeprefix(prefix).split("/")
        if key.startswith(prefix) and len(parts) == count:
            yield key, parts


def _sources(entries: Mapping[str, KeyValue]) -> dict[tuple[Tenant, Digest], frozenset[HostId]]:
    holders: dict[tuple[Tenant, Digest], set[HostId]] = {}
    for _, (tenant, hex_digits, host_id) in _segments(entries, SOURCES, 3):
        holders.setdefault((Tenant(tenant), Digest("sha256:" + hex_digits)), set()).add(HostId(host_id))
    return {source: frozenset(hosts) for source, hosts in holders.items()}
