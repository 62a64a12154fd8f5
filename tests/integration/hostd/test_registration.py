"""A host's place in the store: taken, kept, lost and taken again, and never another machine's."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from fleet.codec import decode, encode
from fleet.model.host import Accelerator, Capacity, HostAlive, HostRecord
from fleet.model.ids import HostId
from fleet.store.keyspace import alive_key, host_key
from fleet.store.memory import MemoryStore
from fleet.store.port import KeyValue, Put
from hostd.registration import LEASE_TTL_S, Registration

HOST = HostId("rack1-07")
RECORD = HostRecord(HOST, "10.0.1.7:7611", Capacity(2, 1024, 1024, 8), (), (), Accelerator.TCG, "", (), "0.1.0", 0)
HANG_S = 20.0


class Clock:
    """A time that moves when it is told to, for store and host alike."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class AskedStore(MemoryStore):
    """A store that tells whenever a key was asked for."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.asked = asyncio.Event()

    async def get(self, key: str) -> KeyValue | None:
        """The key now, or None."""
        found = await super().get(key)
        self.asked.set()
        return found


@pytest.fixture
def clock() -> Clock:
    """The time."""
    return Clock()


@pytest.fixture
def store(clock: Clock) -> AskedStore:
    """An empty store."""
    return AskedStore(clock)


@asynccontextmanager
async def running(registration: Registration) -> AsyncIterator[asyncio.Event]:
    """A registration under way; the event is set at each lease."""
    registered = asyncio.Event()
    registration.on_registered(registered.set)
    task = asyncio.create_task(registration.run(RECORD))
    try:
        yield registered
    finally:
        task.cancel()
        await asyncio.wait([task])


async def wait(event: asyncio.Event) -> None:
    async with asyncio.timeout(HANG_S):
        await event.wait()
    event.clear()


async def until(is_so: Callable[[], bool], event: asyncio.Event) -> None:
    """Waits for `event` until it is so."""
    async with asyncio.timeout(HANG_S):
        while not is_so():
            event.clear()
            await event.wait()


async def test_a_host_registers_and_takes_its_proof_away(store: AskedStore, clock: Clock) -> None:
    """Record and proof of life are there while it runs; after a proper end only the record is."""
    registration = Registration(store, HOST, "boot-1", clock)
    assert registration.fence() is None
    async with running(registration) as registered:
        await wait(registered)
        fence = registration.fence()
        assert fence is not None
        assert (await store.transact([fence], [])).is_committed
    assert registration.fence() is None
    assert await store.get(alive_key(HOST)) is None
    found = await store.get(host_key(HOST))
    assert found is not None
    assert replace(decode(HostRecord, found.value), registered_at_ms=0) == RECORD


@pytest.mark.slow
async def test_a_lease_that_may_have_ended_is_no_fence(store: AskedStore, clock: Clock) -> None:
    """By its own clock the host knows, without asking, when it may no longer write; then it takes a new lease."""
    registration = Registration(store, HOST, "boot-1", clock)
    async with running(registration) as registered:
        await wait(registered)
        before = registration.fence()
        assert before is not None
        clock.now_s += LEASE_TTL_S + 1
        assert registration.fence() is None
        store.expire_leases()
        await until(lambda: registration.fence() is not None, registered)
        assert registration.fence() != before
        assert not (await store.transact([before], [])).is_committed


async def test_another_machine_of_that_name_is_not_pushed_aside(store: AskedStore, clock: Clock) -> None:
    """Two machines under one name would run each sandbox twice: the second waits until the first's lease has ended."""
    lease_id = await store.grant_lease(LEASE_TTL_S)
    await store.transact([], [Put(alive_key(HOST), encode(HostAlive(HOST, "boot-other", 1)), lease_id)])
    registration = Registration(store, HOST, "boot-1", clock)
    async with running(registration) as registered:
        # It has tried, was refused, and tries again.
        for _ in range(2):
            await wait(store.asked)
        assert not registered.is_set()
        assert registration.fence() is None
        found = await store.get(alive_key(HOST))
        assert found is not None
        assert decode(HostAlive, found.value).boot_id == "boot-other"
        await store.revoke_lease(lease_id)
        await wait(registered)
        assert registration.fence() is not None


async def test_an_earlier_hostd_of_this_machine_is_followed(store: AskedStore, clock: Clock) -> None:
    """After kill -9 the next hostd does not wait for the dead one's lease."""
    lease_id = await store.grant_lease(LEASE_TTL_S)
    await store.transact([], [Put(alive_key(HOST), encode(HostAlive(HOST, "boot-1", 1)), lease_id)])
    async with running(Registration(store, HOST, "boot-1", clock)) as registered:
        await wait(registered)
        # The dead one's lease ends without taking the new proof with it.
        await store.revoke_lease(lease_id)
        assert await store.get(alive_key(HOST)) is not None


async def test_a_changed_record_replaces_the_old_one_only_under_the_lease(store: AskedStore, clock: Clock) -> None:
    """An update is fenced like everything else a host writes."""
    registration = Registration(store, HOST, "boot-1", clock)
    await registration.update(replace(RECORD, version="0.0.9"))
    assert await store.get(host_key(HOST)) is None
    async with running(registration) as registered:
        await wait(registered)
        await registration.update(replace(RECORD, version="0.2.0"))
        found = await store.get(host_key(HOST))
        assert found is not None
        assert decode(HostRecord, found.value).version == "0.2.0"
        clock.now_s += LEASE_TTL_S + 1
        await registration.update(replace(RECORD, version="0.3.0"))
        found = await store.get(host_key(HOST))
        assert found is not None
        assert decode(HostRecord, found.value).version == "0.2.0"
