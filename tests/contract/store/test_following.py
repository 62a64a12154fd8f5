"""Mirror, lease keeper and election hold on every store."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any

import pytest

from fleet.store.election import Election
from fleet.store.lease import LeaseKeeper
from fleet.store.memory import MemoryStore
from fleet.store.mirror import Mirror
from fleet.store.port import Delete, Put, Store

HANG_S = 20.0


@asynccontextmanager
async def running(*bodies: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs endless bodies beside the test and ends them with it."""
    runners = [asyncio.create_task(body) for body in bodies]
    try:
        yield
    finally:
        for runner in runners:
            runner.cancel()
            with suppress(asyncio.CancelledError):
                await runner


async def until(mirror: Mirror, keys: set[str]) -> None:
    """Waits until the mirror shows exactly `keys`."""
    async with asyncio.timeout(HANG_S):
        while True:
            changed = mirror.changed()
            if set(mirror.entries) == keys:
                return
            await changed.wait()


async def test_a_mirror_follows_its_prefix(store: Store, prefix: str) -> None:
    """What was there, what comes and what goes is seen, and a write's revision can be waited for."""
    await store.transact([], [Put(prefix + "a", b"1")])
    mirror = Mirror(store, prefix)
    async with running(mirror.run()):
        await until(mirror, {prefix + "a"})
        committed = await store.transact([], [Put(prefix + "b", b"2"), Delete(prefix + "a")])
        await mirror.wait_for(committed.revision, HANG_S)
        assert [entry.value for entry in mirror.under(prefix)] == [b"2"]


async def test_a_mirror_survives_compaction_and_lists_again(store: Store, prefix: str) -> None:
    """A mirror whose revision was compacted away shows the truth again after its next listing."""
    mirror = Mirror(store, prefix, relist_s=0.2)
    async with running(mirror.run()):
        for index in range(3):
            committed = await store.transact([], [Put(prefix + str(index), b"")])
            await store.compact(committed.revision)
        await until(mirror, {prefix + "0", prefix + "1", prefix + "2"})


async def test_a_mirror_keeps_its_state_while_the_store_is_away(prefix: str) -> None:
    """With the store away the last state stays, marked as not fresh; when it is back the mirror catches up."""
    store = MemoryStore(monotonic)
    await store.transact([], [Put(prefix + "a", b"")])
    mirror = Mirror(store, prefix, relist_s=0.05)
    async with running(mirror.run()):
        await until(mirror, {prefix + "a"})
        store.is_reachable = False
        async with asyncio.timeout(HANG_S):
            while mirror.is_fresh:  # noqa: ASYNC110 (staleness is a flag, no event)
                await asyncio.sleep(0)
        assert set(mirror.entries) == {prefix + "a"}
        store.is_reachable = True
        await store.transact([], [Put(prefix + "b", b"")])
        await until(mirror, {prefix + "a", prefix + "b"})


async def test_a_lost_lease_is_replaced(store: Store, prefix: str) -> None:
    """When its lease is taken away the keeper takes a new one and puts its keys under it again."""
    leases: asyncio.Queue[int] = asyncio.Queue()

    async def register(lease_id: int) -> None:
        await store.transact([], [Put(prefix + "alive", b"", lease_id)])
        leases.put_nowait(lease_id)

    keeper = LeaseKeeper(store, 1.0, register, monotonic)
    async with asyncio.timeout(HANG_S), running(keeper.run()):
        first = await leases.get()
        assert keeper.is_held
        await store.revoke_lease(first)
        second = await leases.get()
        assert second != first
        assert await store.get(prefix + "alive") is not None
    assert not keeper.is_held
    assert await store.get(prefix + "alive") is None


async def test_one_leads_and_the_other_follows(store: Store, prefix: str) -> None:
    """Of two candidates one leads; when it resigns the other takes over, and the old fence opens nothing any more."""
    first, second = (Election(store, prefix + "leader", name, 2.0, monotonic) for name in ("one", "two"))
    async with asyncio.timeout(HANG_S):
        async with running(second.run()):
            async with running(first.run()):
                winners = [asyncio.create_task(one.wait_until_leading()) for one in (first, second)]
                await asyncio.wait(winners, return_when=asyncio.FIRST_COMPLETED)
                leader, other = (first, second) if first.fence() else (second, first)
                old_fence = leader.fence()
                assert old_fence is not None
                assert other.fence() is None
                for winner in winners:
                    winner.cancel()
            # `first` has resigned: whoever led before, `second` leads now.
            await second.wait_until_leading()
            fence = second.fence()
            assert fence is not None
            if leader is first:
                assert not (await store.transact([old_fence], [Put(prefix + "x", b"")])).is_committed
            assert (await store.transact([fence], [Put(prefix + "y", b"")])).is_committed


async def test_a_candidate_that_just_lost_can_be_ended(store: Store, prefix: str) -> None:
    """A cancellation is obeyed also while a lost candidacy is taken back."""
    candidates = [Election(store, prefix + "leader", name, 2.0, monotonic) for name in ("one", "two")]
    runners = [asyncio.create_task(one.run()) for one in candidates]
    winners = [asyncio.create_task(one.wait_until_leading()) for one in candidates]
    await asyncio.wait(winners, timeout=HANG_S, return_when=asyncio.FIRST_COMPLETED)
    # The loser first: at this moment it gives back the lease of its candidacy.
    for index in sorted(range(2), key=lambda index: candidates[index].fence() is not None):
        runners[index].cancel()
        ended, _ = await asyncio.wait({runners[index]}, timeout=HANG_S)
        assert ended == {runners[index]}
    for winner in winners:
        winner.cancel()


@pytest.mark.parametrize("reachable", [False])
async def test_an_unsure_lease_is_not_held(reachable: bool, prefix: str) -> None:
    """A keeper that cannot reach the store gives its lease up by its own clock, before the store would."""
    now = 0.0
    store = MemoryStore(lambda: now)
    granted = asyncio.Event()

    async def register(lease_id: int) -> None:
        granted.set()

    async def pause(_delay_s: float) -> None:
        await asyncio.sleep(0)

    keeper = LeaseKeeper(store, 10.0, register, lambda: now, pause)
    async with running(keeper.run()):
        await granted.wait()
        assert keeper.is_held
        store.is_reachable = reachable
        now = 9.9
        assert keeper.is_held
        now = 10.0
        assert not keeper.is_held
