"""A host's meter: what counts, what is remembered, and what is told."""

from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest

from fleet.codec import decode, encode
from fleet.model.assignment import Assignment
from fleet.model.budget import Charged, Meter
from fleet.model.ids import HostId, SandboxId
from fleet.model.sandbox import Resources
from fleet.store.keyspace import alive_key, charged_key, meter_key
from fleet.store.memory import MemoryStore
from fleet.store.port import Put, Unmoved
from hostd.meter import MeterKeeper
from hostd.reconcile.state import DomainState
from tests.unit.scheduler.build import assignment, host, record, spec

ONE = HostId("one")
WISH = record(0, spec=spec(0, resources=Resources(2, 512, 1024)))
ORDER = assignment(WISH, host(), accounts=("team", ""))
RUNS = {ORDER.sandbox_id: DomainState.RUNNING}
PAUSED = {ORDER.sandbox_id: DomainState.PAUSED}


class Bench:
    """A host's meter on a disk and a store, with a clock of the test's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = MemoryStore(monotonic)
        self.now_ms = 1_000
        self.orders: dict[SandboxId, Assignment] = {ORDER.sandbox_id: ORDER}
        self.meter = self.begin()

    def begin(self, boot_id: str = "boot") -> MeterKeeper:
        """Another hostd begins."""
        self.meter = MeterKeeper(
            ONE,
            self.store,
            lambda: self.orders,
            self.folder,
            boot_id,
            boottime_ms=lambda: self.now_ms,
            now_ms=lambda: 5,
        )
        return self.meter

    def after(self, elapsed_ms: int, domains: dict[SandboxId, DomainState]) -> None:
        """It looks again after so long."""
        self.now_ms += elapsed_ms
        self.meter.look(domains)

    async def publish(self) -> Meter:
        """Publishes under a lease that is held; what the store has then."""
        held = await self.store.transact([], [Put(alive_key(ONE), b"")])
        assert await self.meter.publish(Unmoved(alive_key(ONE), held.revision))
        found = await self.store.get(meter_key(ONE))
        assert found is not None
        return decode(Meter, found.value)

    @property
    def wall_ms(self) -> int:
        """What was measured of the one sandbox."""
        return sum(entry.used.wall_ms for entry in self.meter.entries)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_only_what_runs_counts(bench: Bench) -> None:
    """From one look to the next while the domain runs: not before its start, not while it is paused, not after its end."""
    bench.after(500, {})
    bench.after(100, RUNS)
    bench.after(1_000, PAUSED)
    bench.after(5_000, RUNS)
    bench.after(300, {})
    bench.after(9_000, {})
    assert bench.wall_ms == 1_300
    (entry,) = bench.meter.entries
    assert (entry.used.vcpu_ms, entry.accounts) == (2_600, ("team", ""))


async def test_a_killed_hostd_counts_on(bench: Bench) -> None:
    """What still runs has run all the while; what ended meanwhile is counted to what was written; after a boot nothing ran on."""
    bench.after(0, RUNS)
    bench.after(1_000, RUNS)
    await bench.publish()
    bench.begin()
    bench.after(4_000, RUNS)
    assert bench.wall_ms == 5_000
    await bench.publish()
    bench.begin()
    bench.after(60_000, {})
    assert bench.wall_ms == 5_000
    bench.begin("another boot")
    bench.after(60_000, RUNS)
    assert bench.wall_ms == 5_000


async def test_a_host_that_lost_its_state_goes_on(bench: Bench) -> None:
    """With the file gone, counters and periods go on from what was published."""
    bench.after(0, RUNS)
    bench.after(1_000, RUNS)
    first = await bench.publish()
    (bench.folder / "meter").unlink()
    bench.begin()
    bench.after(0, RUNS)
    bench.after(10, RUNS)
    second = await bench.publish()
    assert second.period > first.period
    assert [entry.used.wall_ms for entry in second.entries] == [1_000]


async def test_an_entry_stays_until_it_is_charged(bench: Bench) -> None:
    """Its order may be gone: while the scheduler has not charged all of it, it is told."""
    bench.after(0, RUNS)
    bench.after(1_000, {})
    bench.orders.clear()
    told = await bench.publish()
    assert len(told.entries) == 1
    part = replace(told.entries[0], used=replace(told.entries[0].used, wall_ms=1))
    for entry, left in ((part, 1), (told.entries[0], 0)):
        await bench.store.transact([], [Put(charged_key(ONE), encode(Charged(ONE, told.period, (entry,))))])
        assert len((await bench.publish()).entries) == left


async def test_nothing_new_is_not_told(bench: Bench) -> None:
    """A host on which nothing runs writes nothing; one whose lease is gone cannot."""
    bench.after(0, RUNS)
    bench.after(1_000, {})
    period = (await bench.publish()).period
    assert (await bench.publish()).period == period
    bench.after(10, RUNS)
    bench.after(10, RUNS)
    assert not await bench.meter.publish(Unmoved(alive_key(ONE), 0))
