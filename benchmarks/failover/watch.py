"""What the fleet's store says while it is hurt, as it comes: who leads, what is placed when, and whether the books agree."""

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from fleet.identity import TlsFiles
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal
from fleet.store.etcd import EtcdStore, open_etcd
from fleet.store.keyspace import ASSIGNMENTS, LEADER, ROOT
from fleet.store.mirror import Mirror
from fleet.store.port import KeyValue, StoreUnavailableError
from scheduler.placement.snapshot import Snapshot, repairs
from scheduler.state import FleetState

# Longer than any failover may take; past it the fleet does not come back by itself.
FAILOVER_TIMEOUT_S = 90.0
# A lease of 15 s, a wait of 30 s, twice if the leader changes; a fleet that needs longer has forgotten the host.
LOSS_TIMEOUT_S = 150.0
# The cycle books within milliseconds of what it sees; it looks at everything every five seconds.
BOOKED_TIMEOUT_S = 12.0
RETRY_S = 0.1
ASK_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Failover:
    """Seconds from a fault to each step: nobody leads, another does, the first sandbox asked for since is placed."""

    vacant_s: float | None
    elected_s: float | None
    placed_s: float


class StoreWatch:
    """A mirror of the fleet's store with the moments of its changes, in seconds of the monotonic clock."""

    def __init__(self, endpoints: Sequence[str], tls: TlsFiles) -> None:
        self._endpoints = tuple(endpoints)
        self._tls = tls
        self.store = open_etcd(endpoints, tls)
        self._mirror = Mirror(self.store, ROOT)
        self._state = FleetState(self._mirror)
        self._mirror.on_change(self._note)
        # Which scheduler leads, as far as is known; empty when none does.
        self.leader = ""
        self._left_s = 0.0
        self._won_s = 0.0
        self._placed_s: dict[SandboxId, float] = {}

    async def run(self) -> None:
        """Follows until cancelled; asks now and then, as every program does, so that a silent member is left."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._mirror.run())
            group.create_task(self._ask())

    async def _ask(self) -> None:
        while True:
            with suppress(StoreUnavailableError):
                await self.store.get(LEADER)
            await asyncio.sleep(ASK_INTERVAL_S)

    async def until_led(self) -> str:
        """The leader, once there is one; raises TimeoutError."""
        async with asyncio.timeout(FAILOVER_TIMEOUT_S):
            while not self.leader:
                await self._mirror.changed().wait()
        return self.leader

    async def measure(self, fault_s: float, asked: set[SandboxId]) -> Failover:
        """From the fault to the placement of one of `asked`, which may grow meanwhile; raises TimeoutError."""
        async with asyncio.timeout(FAILOVER_TIMEOUT_S):
            while not (placed := [self._placed_s[one] for one in asked if one in self._placed_s]):
                await self._mirror.changed().wait()
        left, won = self._left_s, self._won_s
        return Failover(
            round(left - fault_s, 3) if left > fault_s else None,
            round(won - fault_s, 3) if won > fault_s else None,
            round(min(placed) - fault_s, 3),
        )

    async def until_left(self, host: str, sandboxes: Collection[SandboxId]) -> None:
        """Returns once none of these is to run on that host any more; raises TimeoutError."""
        async with asyncio.timeout(LOSS_TIMEOUT_S):
            while any(self._is_ordered(host, one) for one in sandboxes):
                await self._mirror.changed().wait()

    def _is_ordered(self, host: str, sandbox_id: SandboxId) -> bool:
        seen = self._state.snapshot()
        order, record = seen.assignments.get(sandbox_id), seen.records.get(sandbox_id)
        wanted = record is not None and record.goal is Goal.RUN
        return wanted and order is not None and order.host_id == host and order.goal is Goal.RUN

    async def snapshot(self) -> Snapshot:
        """All there is, as of a revision after now; raises TimeoutError."""
        async with asyncio.timeout(FAILOVER_TIMEOUT_S):
            while True:
                try:
                    await self._mirror.catch_up()
                    return self._state.snapshot()
                except StoreUnavailableError:
                    await asyncio.sleep(RETRY_S)

    async def wrong_books(self) -> list[str]:
        """The reservations that are not the sum of what is placed, nor become it: a host's release is booked a moment later."""
        deadline = time.monotonic() + BOOKED_TIMEOUT_S
        while True:
            # Without the sums that are kept: they are made anew from what is there.
            wrong = repairs(replace(await self.snapshot(), kept=None))
            if not wrong or time.monotonic() > deadline:
                return [f"must be {one}" for one in wrong]
            await asyncio.sleep(RETRY_S)

    async def etcd_leader(self) -> str:
        """The endpoint of the member that the others follow; raises TimeoutError."""
        async with asyncio.timeout(FAILOVER_TIMEOUT_S):
            while True:
                for endpoint in self._endpoints:
                    if await self._leads(endpoint):
                        return endpoint
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Ends the connections."""
        await self.store.close()

    def member(self, endpoint: str) -> EtcdStore:
        """A store of one member only."""
        return open_etcd([endpoint], self._tls)

    async def _leads(self, endpoint: str) -> bool:
        store = self.member(endpoint)
        try:
            return (await store.condition()).is_leader
        except StoreUnavailableError:
            return False
        finally:
            await store.close()

    def _note(self, changes: Mapping[str, KeyValue | None]) -> None:
        now_s = time.monotonic()
        for key in changes:
            found = self._mirror.entries.get(key)
            if key == LEADER:
                # Of a vacancy that is over before it is seen only the end is known.
                self._left_s = now_s if self.leader else self._left_s
                self._won_s = now_s if found else self._won_s
                self.leader = found.value.decode() if found else ""
            elif key.startswith(ASSIGNMENTS) and found:
                self._placed_s.setdefault(SandboxId(key.rsplit("/", 1)[1]), now_s)
