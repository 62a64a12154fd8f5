"""Every store keeps fleet/store/port.py's promises: revisions, transactions, leases, watches, compaction."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from fleet.errors import ConflictError
from fleet.identity import Role
from fleet.store.etcd import open_etcd
from fleet.store.port import (
    TRANSACTION_OPS_MAX,
    VALUE_BYTES_MAX,
    CompactedError,
    Delete,
    EventKind,
    Put,
    Store,
    StoreUnavailableError,
    Unmoved,
    WatchEvent,
)
from provisioning.embedded.pki import tls_files

HANG_S = 20.0


async def put(store: Store, key: str, value: bytes = b"v", lease_id: int = 0) -> int:
    """Writes one key and returns its revision."""
    committed = await store.transact([], [Put(key, value, lease_id)])
    assert committed.is_committed
    return committed.revision


async def take(batches: AsyncIterator[Sequence[WatchEvent]], count: int) -> list[WatchEvent]:
    """The next `count` events of a watch."""
    events: list[WatchEvent] = []
    async with asyncio.timeout(HANG_S):
        while len(events) < count:
            events += await anext(batches)
    return events


async def test_put_get_delete(store: Store, prefix: str) -> None:
    """A key is what was put last, keeps its creation revision, and is gone when deleted."""
    first = await put(store, prefix + "a", b"1")
    second = await put(store, prefix + "a", b"2")
    found = await store.get(prefix + "a")
    assert found is not None
    assert (found.value, found.create_revision, found.mod_revision) == (b"2", first, second)
    await store.transact([], [Delete(prefix + "a")])
    assert await store.get(prefix + "a") is None


async def test_listing_is_sorted_and_bounded_by_the_prefix(store: Store, prefix: str) -> None:
    """A listing holds exactly the keys under the prefix, in key order, past one page too."""
    names = [f"{prefix}k{index:04}" for index in range(1100)]
    for start in range(0, len(names), TRANSACTION_OPS_MAX):
        await store.transact([], [Put(name, b"") for name in names[start : start + TRANSACTION_OPS_MAX]])
    await put(store, prefix[:-1] + "0", b"next to the prefix, not under it")
    listing = await store.list_prefix(prefix)
    assert [entry.key for entry in listing.entries] == names
    assert listing.revision >= max(entry.mod_revision for entry in listing.entries)


async def test_a_transaction_is_all_or_nothing(store: Store, prefix: str) -> None:
    """One condition that does not hold, and nothing is written; the second of two rivals loses."""
    revision = await put(store, prefix + "a")
    refused = await store.transact(
        [Unmoved(prefix + "a", revision), Unmoved(prefix + "b", 1)], [Put(prefix + "c", b"")]
    )
    assert not refused.is_committed
    assert await store.get(prefix + "c") is None
    rivals = [store.transact([Unmoved(prefix + "d", 0)], [Put(prefix + "d", bytes([index]))]) for index in range(8)]
    outcomes = await asyncio.gather(*rivals)
    assert sum(outcome.is_committed for outcome in outcomes) == 1


async def test_limits_are_refused_before_they_are_sent(store: Store, prefix: str) -> None:
    """Too many operations, too large a value and a key written twice are the caller's errors."""
    with pytest.raises(ValueError, match="past"):
        await store.transact([], [Put(f"{prefix}{index}", b"") for index in range(TRANSACTION_OPS_MAX + 1)])
    with pytest.raises(ValueError, match="bytes"):
        await store.transact([], [Put(prefix + "a", b"x" * (VALUE_BYTES_MAX + 1))])
    with pytest.raises(ValueError, match="twice"):
        await store.transact([], [Put(prefix + "a", b"1"), Delete(prefix + "a")])


async def test_a_lease_takes_its_keys_with_it(store: Store, prefix: str) -> None:
    """Revoking a lease deletes its keys; renewing it afterwards says that it is gone; writing under it is a conflict."""
    lease_id = await store.grant_lease(30)
    await put(store, prefix + "a", lease_id=lease_id)
    assert await store.renew_lease(lease_id) > 0
    await store.revoke_lease(lease_id)
    assert await store.get(prefix + "a") is None
    assert await store.renew_lease(lease_id) == 0.0
    await store.revoke_lease(lease_id)
    with pytest.raises(ConflictError):
        await put(store, prefix + "b", lease_id=lease_id)


async def test_a_lease_that_is_not_renewed_ends(store: Store, prefix: str) -> None:
    """The keys of a lease go when its time is over, and a watch tells."""
    lease_id = await store.grant_lease(1)
    revision = await put(store, prefix + "a", lease_id=lease_id)
    async with store.watch(prefix, revision + 1) as batches:
        reader = asyncio.create_task(take(batches, 1))
        async with asyncio.timeout(HANG_S):
            # Looking is what makes the in-memory twin notice; etcd ends leases by itself.
            while await store.get(prefix + "a") is not None:
                await asyncio.wait([reader], timeout=0.2)
            (event,) = await reader
    assert (event.kind, event.key) == (EventKind.DELETE, prefix + "a")


async def test_a_watch_replays_and_follows(store: Store, prefix: str) -> None:
    """A watch gives every change since its revision, in order, of its prefix only, and then what comes."""
    first = await put(store, prefix + "a", b"1")
    await put(store, "/elsewhere" + prefix, b"")
    await store.transact([], [Put(prefix + "b", b"2"), Delete(prefix + "a")])
    async with store.watch(prefix, first) as batches:
        events = await take(batches, 3)
        assert [(event.kind, event.key) for event in events[:1]] == [(EventKind.PUT, prefix + "a")]
        assert {(event.kind, event.key) for event in events[1:]} == {
            (EventKind.PUT, prefix + "b"),
            (EventKind.DELETE, prefix + "a"),
        }
        revision = await put(store, prefix + "c", b"3")
        (event,) = await take(batches, 1)
        assert (event.value, event.mod_revision) == (b"3", revision)


async def test_a_compacted_revision_is_told(store: Store, prefix: str) -> None:
    """A watch from before the compaction ends with CompactedError, so that the reader lists again."""
    first = await put(store, prefix + "a", b"1")
    last = await put(store, prefix + "a", b"2")
    await store.compact(last)
    with pytest.raises(CompactedError):
        async with asyncio.timeout(HANG_S), store.watch(prefix, first) as batches:
            await anext(batches)


@pytest.mark.root
async def test_a_tenant_cannot_open_the_store(etcd_endpoint: tuple[str, Path]) -> None:
    """A certificate of the same authority but without the store's client name is turned away by etcd."""
    endpoint, pki = etcd_endpoint
    store = open_etcd([endpoint], tls_files(pki, Role.TENANT, "demo"))
    with pytest.raises(StoreUnavailableError):
        await store.get("/a")
    await store.close()


async def test_the_past_can_be_listed(store: Store, prefix: str) -> None:
    """A listing at a revision is what there was then, deletes and later values included; compacted, or to come, it is told."""
    first = await store.transact([], [Put(prefix + "a", b"1"), Put(prefix + "b", b"1")])
    second = await store.transact([], [Put(prefix + "a", b"2"), Delete(prefix + "b"), Put(prefix + "c", b"2")])
    third = await store.transact([], [Put(prefix + "b", b"3")])

    async def then(revision: int) -> dict[str, tuple[bytes, int, int]]:
        listing = await store.list_prefix(prefix, revision)
        assert listing.revision == revision
        return {
            one.key.removeprefix(prefix): (one.value, one.create_revision, one.mod_revision) for one in listing.entries
        }

    one, two, three = first.revision, second.revision, third.revision
    assert await then(one) == {"a": (b"1", one, one), "b": (b"1", one, one)}
    assert await then(two) == {"a": (b"2", one, two), "c": (b"2", two, two)}
    await store.compact(two)
    assert await then(two) == {"a": (b"2", one, two), "c": (b"2", two, two)}
    assert await then(three) == {"a": (b"2", one, two), "b": (b"3", three, three), "c": (b"2", two, two)}
    for gone in (one, three + 1000):
        with pytest.raises(CompactedError):
            await store.list_prefix(prefix, gone)
