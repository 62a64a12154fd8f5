"""Room for sources on this host: a quota for each tenant, and the disk. What no order names and nobody has used lately gives way.

A source that is given up is first taken out of the store, so that nobody counts on it, and then off the disk.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import structlog

from fleet.errors import InvalidSpecError, UnavailableError
from fleet.model.admission import SOURCE_BYTES_MAX
from fleet.model.ids import Digest, HostId, Tenant, digest_hex
from fleet.model.units import MIB
from fleet.store.keyspace import source_key
from fleet.store.port import Delete, Store

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """What a tenant's sources may occupy on this host, and for how long after its last use one stays whatever happens.

    The time must cover that from a source's upload until its sandbox is placed: from then on the order holds it.
    """

    quota_mib: int = 20 * 1024
    keep_s: float = 3600.0

    def check(self) -> None:
        """Raises InvalidSpecError for a number that no host could keep."""
        for name in ("quota_mib", "keep_s"):
            if getattr(self, name) <= 0:
                raise InvalidSpecError("config_invalid", "it is not above zero", "raise it", field=f"sources.{name}")


@dataclass(frozen=True, slots=True)
class HeldSource:
    """One source on this host: what it occupies, and when it was used last (seconds since 1970)."""

    tenant: Tenant
    digest: Digest
    size_bytes: int
    used_at_s: float


Named = Set[tuple[Tenant, Digest]]


class Shelf(Protocol):
    """Where sources lie."""

    def list_held(self) -> Sequence[HeldSource]: ...
    def shortage_bytes(self, size_bytes: int) -> int: ...
    def remove(self, tenant: Tenant, digest: Digest) -> None: ...


class Room:
    """Keeps the shelf of this host within its limits; `named` are the sources that orders name."""

    def __init__(
        self,
        host_id: HostId,
        store: Store,
        shelf: Shelf,
        settings: SourceSettings,
        *,
        named: Callable[[], Named],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._host_id = host_id
        self._store = store
        self._shelf = shelf
        self._settings = settings
        self._named = named
        self._clock = clock
        self._lock = asyncio.Lock()
        # Of the sources that arrive now.
        self._coming_bytes: Counter[Tenant] = Counter()

    @asynccontextmanager
    async def hold(self, tenant: Tenant, size_bytes: int) -> AsyncIterator[None]:
        """Makes room for one more source; within it, while the source arrives, that counts as the tenant's.

        Raises UnavailableError `sources_exhausted` past the tenant's quota. Nothing gives way to a source that is too large anyway:
        whoever takes it in refuses it.
        """
        if size_bytes > SOURCE_BYTES_MAX:
            yield
            return
        async with self._lock:
            await self._make(tenant, size_bytes)
            self._coming_bytes[tenant] += size_bytes
        try:
            yield
        finally:
            self._coming_bytes[tenant] -= size_bytes
            # Without those that are at zero: tenants come and go.
            self._coming_bytes = +self._coming_bytes

    async def _make(self, tenant: Tenant, size_bytes: int) -> None:
        held = await asyncio.to_thread(self._shelf.list_held)
        before_s = self._clock() - self._settings.keep_s
        free = [one for one in held if one.used_at_s < before_s and (one.tenant, one.digest) not in self._named()]
        held_bytes = sum(one.size_bytes for one in held if one.tenant == tenant) + self._coming_bytes[tenant]
        over_bytes = held_bytes + size_bytes - self._settings.quota_mib * MIB
        for one in choose(free, tenant, over_bytes, self._shelf.shortage_bytes(size_bytes)):
            is_gone = await self._give_up(one)
            over_bytes -= one.size_bytes if is_gone and one.tenant == tenant else 0
        if over_bytes > 0:
            message = f"tenant {tenant} has {self._settings.quota_mib} MiB of sources on this host, as much as it may"
            next_step = "destroy sandboxes whose sources are not needed, and try again after an hour; or send less"
            raise UnavailableError("sources_exhausted", message, next_step)

    async def _give_up(self, one: HeldSource) -> bool:
        # Orders may have come while others were given up.
        if (one.tenant, one.digest) in self._named():
            return False
        await self._store.transact([], [Delete(source_key(one.tenant, digest_hex(one.digest), self._host_id))])
        await asyncio.to_thread(self._shelf.remove, one.tenant, one.digest)
        log.info("source.evicted", tenant=one.tenant, digest=one.digest, size_bytes=one.size_bytes)
        return True


def choose(free: Sequence[HeldSource], tenant: Tenant, over_bytes: int, shortage_bytes: int) -> Iterator[HeldSource]:
    """Which of the sources that may go shall go, the longest unused first: for a quota the tenant's own, for the disk anyone's."""
    for one in sorted(free, key=lambda one: (one.used_at_s, one.tenant, one.digest)):
        is_own = one.tenant == tenant
        if shortage_bytes > 0 or (is_own and over_bytes > 0):
            shortage_bytes -= one.size_bytes
            over_bytes -= one.size_bytes if is_own else 0
            yield one
