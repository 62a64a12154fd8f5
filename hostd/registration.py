"""Keeps this host in the store: its record, and its proof of life under a lease.

away -- lease granted, both keys put --> registered -- lease lost --> away

The proof of life is also the fence of the record and of every status: a hostd whose lease ended changes neither any more.
"""

from collections.abc import Callable
from dataclasses import replace

import structlog

from fleet.codec import decode, encode
from fleet.errors import ConflictError, InvalidSpecError
from fleet.model.host import HostAlive, HostRecord
from fleet.model.ids import HostId
from fleet.store.keyspace import alive_key, host_key
from fleet.store.lease import LeaseKeeper
from fleet.store.port import KeyValue, Put, Store, Unmoved
from hostd.clock import boottime_s, now_ms

# Long enough for an election of etcd's leader, short enough that a dead host is known within seconds.
LEASE_TTL_S = 15.0

log = structlog.get_logger()


class Registration:
    """One host's place in the store."""

    def __init__(self, store: Store, host_id: HostId, boot_id: str, clock: Callable[[], float] = boottime_s) -> None:
        self._store = store
        self._host_id = host_id
        self._boot_id = boot_id
        self._keeper = LeaseKeeper(store, LEASE_TTL_S, self._register, clock, on_sure=self._on_sure)
        self._record: HostRecord | None = None
        self._stored: HostRecord | None = None
        self._revision = 0
        self._registered: Callable[[], None] = lambda: None
        self._renewed: Callable[[int], None] = lambda _until_ms: None

    def fence(self) -> Unmoved | None:
        """The condition that this host still holds its lease; None while it does not."""
        if not self._keeper.is_held or not self._revision:
            return None
        return Unmoved(alive_key(self._host_id), self._revision)

    def on_registered(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a lease was taken."""
        self._registered = listener

    def on_renewed(self, listener: Callable[[int], None]) -> None:
        """Call `listener` with the moment, in milliseconds of the clock, until which the host is sure of its lease."""
        self._renewed = listener

    async def run(self, record: HostRecord) -> None:
        """Registers `record` and keeps it alive until cancelled."""
        self._record = record
        await self._keeper.run()

    async def update(self, record: HostRecord) -> None:
        """Replaces the record when it differs, if this host is registered now; else the next registration carries it."""
        self._record = replace(record, registered_at_ms=self._stored.registered_at_ms if self._stored else 0)
        held = self.fence()
        if held is not None and self._record != self._stored:
            committed = await self._store.transact([held], [Put(host_key(self._host_id), encode(self._record))])
            self._stored = self._record if committed.is_committed else None
            log.info("host.updated", host_id=self._host_id, is_committed=committed.is_committed)

    def _on_sure(self, until_s: float) -> None:
        self._renewed(int(until_s * 1000))

    async def _register(self, lease_id: int) -> None:
        assert self._record is not None
        key = alive_key(self._host_id)
        self._revision = 0
        found = await self._store.get(key)
        if found is not None and self._is_another(found):
            message = f"another machine is alive as host {self._host_id}"
            raise ConflictError(
                "host_id_in_use", message, "give each machine a host_id of its own; a reboot waits a lease"
            )
        at_ms = now_ms()
        record = replace(self._record, registered_at_ms=at_ms)
        alive = HostAlive(self._host_id, self._boot_id, at_ms)
        writes = [Put(host_key(self._host_id), encode(record)), Put(key, encode(alive), lease_id)]
        committed = await self._store.transact([Unmoved(key, found.mod_revision if found else 0)], writes)
        if not committed.is_committed:
            raise ConflictError("registration_raced", "the proof of life moved meanwhile", "it is tried again")
        self._revision, self._stored = committed.revision, record
        log.info("host.registered", host_id=self._host_id, lease_id=lease_id, revision=committed.revision)
        self._registered()

    def _is_another(self, found: KeyValue) -> bool:
        # This machine's own earlier hostd may have died a moment ago: its proof is taken over. One with another boot id is
        # a machine of the same name, or this one before a reboot, whose lease ends within LEASE_TTL_S.
        try:
            return decode(HostAlive, found.value).boot_id != self._boot_id
        except InvalidSpecError:
            return False
