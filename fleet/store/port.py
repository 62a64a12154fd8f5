"""What every store promises.

Semantics are etcd's: one revision counter for the whole store; a transaction compares modification revisions and
then writes all or nothing; a lease's keys go when it ends; a watch replays from a revision, or says that the
revision is compacted. `tests/contract/store/test_store.py` holds every implementation to this page.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from fleet.errors import BedplateError, UnavailableError

# etcd's default limit is 128 operations in one transaction; a few stay free for fences.
TRANSACTION_OPS_MAX = 120
# etcd's default request limit is 1.5 MiB; a value past this is refused before it is sent.
VALUE_BYTES_MAX = 1024 * 1024


class CompactedError(BedplateError):
    """The watch's revision is gone: list again, then watch from the list's revision."""


class StoreUnavailableError(UnavailableError):
    """The store did not answer in time, or answered that it cannot."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as it stood at a revision; `lease_id` is 0 when no lease holds it."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """All keys under a prefix in key order, at one revision of the store."""

    revision: int
    entries: tuple[KeyValue, ...]


class EventKind(StrEnum):
    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change of one key; `value` is empty for a delete."""

    kind: EventKind
    key: str
    value: bytes
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Unmoved:
    """Condition: the key's modification revision is still this one; 0 means that the key does not exist."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes = field(repr=False)
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


Write = Put | Delete


@dataclass(frozen=True, slots=True)
class Committed:
    """The outcome of a transaction: whether all conditions held and all was written, and the store's revision then."""

    is_committed: bool
    revision: int


Watch = AbstractAsyncContextManager[AsyncIterator[Sequence[WatchEvent]]]


class Store(Protocol):
    """A revisioned key-value store. Every call raises StoreUnavailableError when it cannot be answered in time."""

    async def get(self, key: str) -> KeyValue | None:
        """The key now (linearizable), or None."""

    async def list_prefix(self, prefix: str, revision: int = 0) -> Listing:
        """Every key under `prefix`, all at one revision (linearizable); pages behind the scenes as needed.

        With `revision` as it was then; raises CompactedError where that is compacted, or not there yet.
        """

    async def transact(self, conditions: Sequence[Unmoved], writes: Sequence[Write]) -> Committed:
        """Write all of `writes` if every condition holds, else nothing. A key may be written once at most.

        Raises ValueError past TRANSACTION_OPS_MAX operations or VALUE_BYTES_MAX bytes in a value.
        """

    def watch(self, prefix: str, from_revision: int) -> Watch:
        """Batches of changes under `prefix` from `from_revision` on, in order, none split within a revision.

        Leaving the context ends the watch. The iterator raises CompactedError when `from_revision` is compacted, and
        StoreUnavailableError when the connection breaks: the caller resumes from the last revision it saw plus one.
        """

    async def grant_lease(self, ttl_s: float) -> int:
        """A new lease's id; its keys are deleted when it is not renewed for `ttl_s` seconds."""

    async def renew_lease(self, lease_id: int) -> float:
        """Renew once; seconds it now has to live, or 0.0 when the lease is already gone."""

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease and delete its keys; nothing happens when it is gone already."""

    async def compact(self, revision: int) -> None:
        """Forget the history before `revision`."""

    async def close(self) -> None:
        """Let go of connections; the store is of no use afterwards."""


def check_transaction(conditions: Sequence[Unmoved], writes: Sequence[Write]) -> None:
    """Raises ValueError when a transaction is past its limits or writes a key twice."""
    if len(conditions) > TRANSACTION_OPS_MAX or len(writes) > TRANSACTION_OPS_MAX:
        raise ValueError(f"{len(conditions)} conditions, {len(writes)} writes: past {TRANSACTION_OPS_MAX}")
    if len({write.key for write in writes}) < len(writes):
        raise ValueError("a transaction writes a key twice")
    for write in writes:
        if isinstance(write, Put) and len(write.value) > VALUE_BYTES_MAX:
            raise ValueError(f"the value of {write.key} is past {VALUE_BYTES_MAX} bytes")
