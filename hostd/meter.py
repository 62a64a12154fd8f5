"""Measures what each placement on this host uses, durably, and publishes it: counters that only grow.

A VM counts while its domain runs and is not paused, from one look to the next. A hostd that was away counts what still runs for all
that time; of what ended meanwhile it knows only what it had written. An entry goes when it is charged and its order is gone.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import structlog

from fleet.codec import decode, encode
from fleet.errors import BedplateError, InvalidSpecError
from fleet.model.assignment import Assignment
from fleet.model.budget import Charged, Meter, MeterBook, MeterEntry
from fleet.model.ids import HostId, SandboxId
from fleet.model.sandbox import Totals
from fleet.store.keyspace import charged_key, meter_key
from fleet.store.port import Put, Store, Unmoved
from hostd.clock import now_ms
from hostd.files import disk_faults, write_durable
from hostd.reconcile.state import DomainState

# What the scheduler estimates in between; each is one write of the host and one of the scheduler's with its balances.
METER_PERIOD_S = 15.0
# After an end, and after a failure: ends that come together are told together.
SOON_S, RETRY_S = 0.3, 2.0
BOOK = "meter"

Placed = tuple[SandboxId, int]
T = TypeVar("T")

log = structlog.get_logger()


class MeterKeeper:
    """This host's meter: `look` whenever the domains were looked at, `run` beside it."""

    def __init__(
        self,
        host_id: HostId,
        store: Store,
        orders: Callable[[], Mapping[SandboxId, Assignment]],
        folder: Path,
        boot_id: str,
        *,
        boottime_ms: Callable[[], int],
        now_ms: Callable[[], int] = now_ms,
        period_s: float = METER_PERIOD_S,
    ) -> None:
        self._host_id = host_id
        self._store = store
        self._orders = orders
        self._path = folder / BOOK
        self._boottime_ms = boottime_ms
        self._now_ms = now_ms
        self._period_s = period_s
        self._book = _load(self._path, host_id)
        if self._book.boot_id != boot_id:
            self._book = replace(self._book, boot_id=boot_id, running=())
        self._has_looked = False
        self._has_recalled = False
        self._is_told = False
        self._ended = asyncio.Event()

    @property
    def entries(self) -> tuple[MeterEntry, ...]:
        """What was measured until the last look."""
        return self._book.meter.entries

    def look(self, domains: Mapping[SandboxId, DomainState]) -> None:
        """The domains are in these states now."""
        running = tuple(sorted(one for one, state in domains.items() if state is DomainState.RUNNING))
        before = self._book.running
        if not self._has_looked:
            # Whether what has ended since an earlier hostd looked ran on for long, nobody knows.
            before = tuple(one for one in before if one in running)
        self._has_looked = True
        now = self._boottime_ms()
        meter = add_elapsed(self._book.meter, before, self._orders(), max(0, now - self._book.looked_ms))
        self._is_told = self._is_told and not before
        self._book = replace(self._book, meter=meter, looked_ms=now, running=running)
        if set(before) - set(running):
            self._ended.set()

    async def run(self, fence: Callable[[], Unmoved | None]) -> None:
        """Publishes every period, and soon after an end, until cancelled; `fence` as for statuses."""
        while True:
            pause_s = self._period_s
            try:
                held = fence()
                if held is None or not await self.publish(held):
                    pause_s = RETRY_S
            except BedplateError as error:
                log.warning("meter.unpublished", code=error.code, error=error.message)
                pause_s = RETRY_S
            await asyncio.sleep(SOON_S)
            try:
                async with asyncio.timeout(pause_s):
                    await self._ended.wait()
            except TimeoutError:
                continue

    async def publish(self, held: Unmoved) -> bool:
        """Writes the meter down and publishes it, if it says something new; False when the lease is gone."""
        self._ended.clear()
        await self._recall()
        charged = await self._charged()
        kept = tuple(entry for entry in self.entries if not self._is_done(entry, charged))
        if self._is_told and kept == self.entries:
            return True
        meter = replace(self._book.meter, period=self._book.meter.period + 1, at_ms=self._now_ms(), entries=kept)
        self._book = replace(self._book, meter=meter)
        # First to the disk: what is charged was never less than what is known here.
        write_durable(self._path, encode(self._book))
        committed = await self._store.transact([held], [Put(meter_key(self._host_id), encode(meter))])
        if committed.is_committed and self._book.meter.entries == kept:
            self._is_told = True
        return committed.is_committed

    async def _recall(self) -> None:
        """A host that has lost its state goes on from what it has published."""
        if self._has_recalled:
            return
        found = await self._store.get(meter_key(self._host_id))
        known = _decode(Meter, found.value) if found is not None else None
        if known is not None:
            self._book = replace(self._book, meter=merge(self._book.meter, known))
        self._has_recalled = True

    async def _charged(self) -> Mapping[Placed, Totals]:
        found = await self._store.get(charged_key(self._host_id))
        known = _decode(Charged, found.value) if found is not None else None
        return {_placed(entry): entry.used for entry in known.entries} if known is not None else {}

    def _is_done(self, entry: MeterEntry, charged: Mapping[Placed, Totals]) -> bool:
        order, paid = self._orders().get(entry.sandbox_id), charged.get(_placed(entry))
        if order is not None and max(1, order.placement) == entry.placement:
            return False
        return paid is not None and replace(paid, cost_micro=0) == entry.used


def add_elapsed(
    meter: Meter, running: tuple[SandboxId, ...], orders: Mapping[SandboxId, Assignment], elapsed_ms: int
) -> Meter:
    """The meter after what was `running` has run for so long."""
    entries = {_placed(entry): entry for entry in meter.entries}
    for sandbox_id in running:
        order = orders.get(sandbox_id)
        if order is None:
            # Ended and forgotten between two looks: milliseconds.
            continue
        placed = (sandbox_id, max(1, order.placement))
        known = entries.get(placed) or MeterEntry(sandbox_id, order.tenant, placed[1], Totals(), order.accounts)
        entries[placed] = replace(known, used=_run_on(known.used, order, elapsed_ms))
    return replace(meter, entries=tuple(entries.values()))


def merge(own: Meter, published: Meter) -> Meter:
    """Both meters' entries, of each counter the larger; the later period."""
    entries = {_placed(entry): entry for entry in published.entries}
    for entry in own.entries:
        known = entries.get(_placed(entry))
        entries[_placed(entry)] = replace(entry, used=_larger(entry.used, known.used)) if known is not None else entry
    return replace(own, period=max(own.period, published.period), entries=tuple(entries.values()))


def _run_on(used: Totals, order: Assignment, elapsed_ms: int) -> Totals:
    wall_ms = used.wall_ms + elapsed_ms
    gpu_milli = sum(share.milli for share in order.gpus)
    return replace(
        used, wall_ms=wall_ms, vcpu_ms=wall_ms * order.spec.resources.vcpus, gpu_ms=wall_ms * gpu_milli // 1000
    )


def _larger(one: Totals, other: Totals) -> Totals:
    return Totals(
        max(one.wall_ms, other.wall_ms),
        max(one.vcpu_ms, other.vcpu_ms),
        max(one.gpu_ms, other.gpu_ms),
        max(one.egress_bytes, other.egress_bytes),
    )


def _placed(entry: MeterEntry) -> Placed:
    return entry.sandbox_id, entry.placement


def _load(path: Path, host_id: HostId) -> MeterBook:
    nothing = MeterBook(Meter(host_id, 0, 0, ()))
    if not path.exists():
        return nothing
    with disk_faults(path):
        content = path.read_bytes()
    try:
        return decode(MeterBook, content)
    except InvalidSpecError as error:
        # What was published is recalled; nobody pays for a bad sector.
        log.warning("meter.unreadable", path=str(path), error=error.message)
        return nothing


def _decode(kind: type[T], content: bytes) -> T | None:
    try:
        return decode(kind, content)
    except InvalidSpecError:
        return None
