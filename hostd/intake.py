"""Takes this host's orders from the store into its own folder. With the store away the last orders stay in force.

waiting -- registered, and what an earlier hostd has published is read --> taking

After each lease it also tells when all is taken that was ordered before (`settle`): only then may paused VMs run on.
So a machine that only bears another's name takes no order of it, and a host that has lost its own state runs no agent again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import structlog

from fleet.codec import decode
from fleet.errors import BedplateError, InvalidSpecError
from fleet.model.assignment import Assignment
from fleet.model.ids import HostId, SandboxId
from fleet.model.sandbox import Goal, SandboxStatus
from fleet.store.keyspace import host_assignments
from fleet.store.mirror import Mirror
from hostd.orders import Orders
from hostd.reconcile.loop import Reconciler

# An order that could not be taken (no address was free) is tried again, also when nothing has changed.
LOOK_INTERVAL_S = 10.0
RETRY_S = 2.0

# Reads what this host has published; raises StoreUnavailableError.
Recall = Callable[[], Awaitable[Mapping[SandboxId, SandboxStatus | None]]]

log = structlog.get_logger()


class Intake:
    """Keeps the orders folder equal to the store's assignments for one host."""

    def __init__(self, host_id: HostId, recall: Recall, mirror: Mirror, orders: Orders, reconciler: Reconciler) -> None:
        self._host_id = host_id
        self._recall = recall
        self._mirror = mirror
        self._orders = orders
        self._reconciler = reconciler
        self._vanished: frozenset[SandboxId] = frozenset()
        self._told: Mapping[SandboxId, SandboxStatus | None] = {}
        self._renewed = asyncio.Event()
        self.registered, self.has_taken = asyncio.Event(), asyncio.Event()

    def note_registered(self) -> None:
        """A new lease stands."""
        self.registered.set()
        self._renewed.set()

    async def run(self) -> None:
        """Follows the mirror until cancelled, from the moment `registered` is set; sets `has_taken` after its first look."""
        await self.registered.wait()
        self._told = await self._read_told()
        while True:
            changed = self._mirror.changed()
            if self._mirror.is_fresh:
                self._take()
                self.has_taken.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    await changed.wait()

    async def settle(self, settled: Callable[[], None]) -> None:
        """Calls `settled` after each lease, once all that was ordered before it is taken; until cancelled."""
        while True:
            await self._renewed.wait()
            self._renewed.clear()
            await self.has_taken.wait()
            try:
                await self._mirror.catch_up()
            except BedplateError as error:
                log.warning("orders.unread", code=error.code, error=error.message)
                self._renewed.set()
            else:
                # A new lease meanwhile has orders of its own to wait for.
                if not self._renewed.is_set() and self._take():
                    settled()
                    continue
                self._renewed.set()
            await asyncio.sleep(RETRY_S)

    async def _read_told(self) -> Mapping[SandboxId, SandboxStatus | None]:
        while True:
            try:
                return await self._recall()
            except BedplateError as error:
                log.warning("status.unread", code=error.code, error=error.message)
                await asyncio.sleep(RETRY_S)

    def _take(self) -> bool:
        """Whether no sandbox that was known before is left with an order of yesterday."""
        wanted, known = self._read(), frozenset(self._orders.orders)
        for sandbox_id, order in wanted.items():
            if self._orders.orders.get(sandbox_id) != order:
                self._accept(order)
        gone = frozenset(self._orders.orders) - frozenset(wanted)
        for sandbox_id in sorted(gone):
            # An assignment is deleted only after its sandbox was ordered away. One that is missing otherwise was lost with the
            # store, and no accident there may end a running VM.
            if self._orders.orders[sandbox_id].goal is Goal.REMOVE:
                self._forget(sandbox_id)
            elif sandbox_id not in self._vanished:
                log.warning("order.vanished", sandbox_id=sandbox_id)
        self._vanished = gone & frozenset(self._orders.orders)
        return all(self._orders.orders.get(id_) == wanted[id_] for id_ in known & wanted.keys())

    def _forget(self, sandbox_id: SandboxId) -> None:
        try:
            self._orders.forget_order(sandbox_id)
        except BedplateError as error:
            log.warning("order.unforgotten", sandbox_id=sandbox_id, code=error.code, error=error.message)
            return
        log.info("order.forgotten", sandbox_id=sandbox_id)
        self._reconciler.nudge()

    def _read(self) -> dict[SandboxId, Assignment]:
        wanted = {}
        for entry in self._mirror.under(host_assignments(self._host_id)):
            try:
                order = decode(Assignment, entry.value)
            except InvalidSpecError as error:
                log.warning("order.unreadable", key=entry.key, code=error.code)
                continue
            wanted[order.sandbox_id] = order
        return wanted

    def _accept(self, order: Assignment) -> None:
        try:
            self._reconciler.accept(order, self._told.get(order.sandbox_id))
            log.info("order.taken", sandbox_id=order.sandbox_id, goal=order.goal, generation=order.generation)
        except BedplateError as error:
            log.warning("order.untaken", sandbox_id=order.sandbox_id, code=error.code, error=error.message)
