"""The store on etcd v3, through aetcd's generated stubs over a TLS channel of our own.

aetcd's own client knows no TLS and one endpoint only; its stubs are etcd's wire format and nothing else (docs/decisions/0003).
Source: https://etcd.io/docs/v3.4/learning/api/.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import grpc
from aetcd import rpc

from fleet.channels import LiveChannel
from fleet.credentials import LiveCredentials
from fleet.errors import ConflictError
from fleet.identity import ETCD_SERVER_NAME, TlsFiles
from fleet.rpc import channel_options
from fleet.store.port import (
    Committed,
    CompactedError,
    Delete,
    EventKind,
    KeyValue,
    Listing,
    StoreUnavailableError,
    Unmoved,
    Watch,
    WatchEvent,
    Write,
    check_transaction,
)

# etcd answers in milliseconds; five seconds span an election of its leader.
CALL_TIMEOUT_S = 5.0
PAGE_KEYS = 1000
# After a change of certificate calls end on the old channel; watches are opened anew by then: a mirror lists every 30 s.
LINGER_S = 120.0


def open_etcd(endpoints: Sequence[str], tls: TlsFiles) -> "EtcdStore":
    """The store at `endpoints` ("ip:port" each, one cluster), over mutual TLS; connects when first used."""
    scheme = "ipv6:" if any(endpoint.startswith("[") for endpoint in endpoints) else "ipv4:"
    options = [*channel_options(ETCD_SERVER_NAME), ("grpc.lb_policy_name", "round_robin")]
    target = scheme + ",".join(endpoints)
    opened = partial(grpc.aio.secure_channel, target, options=options)
    return EtcdStore(LiveChannel(LiveCredentials(tls), opened, LINGER_S))


class EtcdStore:
    """fleet.store.port.Store on a gRPC channel, which is another one after the program's certificate was replaced."""

    def __init__(self, channel: LiveChannel) -> None:
        self._channel = channel
        self._stubs = _Stubs(channel.get())

    async def get(self, key: str) -> KeyValue | None:
        """The key now, or None."""
        reply = await self._call(self._now().kv.Range, rpc.RangeRequest(key=key.encode()))
        return _key_value(reply.kvs[0]) if reply.kvs else None

    async def list_prefix(self, prefix: str) -> Listing:
        """Every key under `prefix`, in pages that are all read at the first page's revision."""
        start, end = prefix.encode(), _prefix_end(prefix)
        revision, entries = 0, []
        while True:
            request = rpc.RangeRequest(key=start, range_end=end, limit=PAGE_KEYS, revision=revision)
            reply = await self._call(self._now().kv.Range, request)
            revision = revision or reply.header.revision
            entries += [_key_value(found) for found in reply.kvs]
            if not reply.more:
                return Listing(revision, tuple(entries))
            start = reply.kvs[-1].key + b"\0"

    async def transact(self, conditions: Sequence[Unmoved], writes: Sequence[Write]) -> Committed:
        """All writes if every condition holds; raises ConflictError `lease_gone` when a write's lease has ended."""
        check_transaction(conditions, writes)
        request = rpc.TxnRequest(
            compare=[_compare(one) for one in conditions], success=[_operation(one) for one in writes]
        )
        reply = await self._call(self._now().kv.Txn, request)
        return Committed(reply.succeeded, reply.header.revision)

    def watch(self, prefix: str, from_revision: int) -> Watch:
        """Changes under `prefix` since `from_revision`."""
        return self._open_watch(prefix, from_revision)

    async def grant_lease(self, ttl_s: float) -> int:
        """A new lease's id; etcd counts whole seconds and rounds up to its own minimum."""
        reply = await self._call(self._now().lease.LeaseGrant, rpc.LeaseGrantRequest(TTL=max(1, round(ttl_s))))
        return int(reply.ID)

    async def renew_lease(self, lease_id: int) -> float:
        """Seconds the lease has to live now; 0.0 when it is gone."""
        with _translated():
            stream = self._now().lease.LeaseKeepAlive(timeout=CALL_TIMEOUT_S)
            await stream.write(rpc.LeaseKeepAliveRequest(ID=lease_id))
            reply = await stream.read()
            stream.cancel()
        if reply is grpc.aio.EOF:
            raise StoreUnavailableError("store_unavailable", "etcd closed the keep-alive stream", "it is tried again")
        return float(max(0, reply.TTL))

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease."""
        try:
            await self._call(self._now().lease.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease_id))
        except ConflictError:
            return

    async def compact(self, revision: int) -> None:
        """Forget the history before `revision`."""
        await self._call(self._now().kv.Compact, rpc.CompactionRequest(revision=revision))

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    def _now(self) -> "_Stubs":
        channel = self._channel.get()
        if channel is not self._stubs.channel:
            self._stubs = _Stubs(channel)
        return self._stubs

    async def _call(self, method: Any, request: Any) -> Any:
        with _translated():
            return await method(request, timeout=CALL_TIMEOUT_S)

    @asynccontextmanager
    async def _open_watch(self, prefix: str, from_revision: int) -> AsyncIterator[AsyncIterator[Sequence[WatchEvent]]]:
        creation = rpc.WatchCreateRequest(
            key=prefix.encode(), range_end=_prefix_end(prefix), start_revision=from_revision
        )
        stream = self._now().watch.Watch()
        try:
            with _translated():
                await stream.write(rpc.WatchRequest(create_request=creation))
            yield _batches(stream)
        finally:
            stream.cancel()


class _Stubs:
    """etcd's services on one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.kv = rpc.KVStub(channel)
        self.watch = rpc.WatchStub(channel)
        self.lease = rpc.LeaseStub(channel)


async def _batches(stream: Any) -> AsyncIterator[Sequence[WatchEvent]]:
    while True:
        with _translated():
            reply = await stream.read()
        if reply is grpc.aio.EOF:
            raise StoreUnavailableError("store_unavailable", "etcd closed the watch", "resume it")
        if reply.canceled:
            if reply.compact_revision:
                message = f"revisions before {reply.compact_revision} are compacted"
                raise CompactedError("compacted", message, "list again")
            raise StoreUnavailableError("store_unavailable", "etcd cancelled the watch", "resume it")
        if reply.events:
            yield [_event(event) for event in reply.events]


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.OUT_OF_RANGE:
            raise CompactedError("compacted", "the revision is compacted", "list again") from error
        if error.code() is grpc.StatusCode.NOT_FOUND:
            # etcd knows only one thing that can be missing in our calls.
            raise ConflictError("lease_gone", "the lease has ended", "take a new one") from error
        detail = f"etcd: {error.code().name.lower()}: {error.details()}"
        raise StoreUnavailableError("store_unavailable", detail, "check etcd and the way to it") from error
    except asyncio.CancelledError as error:
        current = asyncio.current_task()
        if current is None or current.cancelling():
            raise
        # Not this program's own doing: the call's channel was closed under it.
        raise StoreUnavailableError("store_unavailable", "the channel to etcd was replaced", "resume it") from error
    except grpc.aio.UsageError as error:
        raise StoreUnavailableError(
            "store_unavailable", "the etcd channel is closed", "open the store again"
        ) from error


def _compare(condition: Unmoved) -> Any:
    target, result = rpc.Compare.MOD, rpc.Compare.EQUAL
    return rpc.Compare(key=condition.key.encode(), target=target, result=result, mod_revision=condition.mod_revision)


def _operation(write: Write) -> Any:
    key = write.key.encode()
    if isinstance(write, Delete):
        return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))
    return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=write.value, lease=write.lease_id))


def _key_value(found: Any) -> KeyValue:
    return KeyValue(found.key.decode(), found.value, found.create_revision, found.mod_revision, found.lease)


def _event(event: Any) -> WatchEvent:
    kind = EventKind.DELETE if event.type == event.DELETE else EventKind.PUT
    return WatchEvent(kind, event.kv.key.decode(), event.kv.value, event.kv.mod_revision)


def _prefix_end(prefix: str) -> bytes:
    # The first key after all that begin with `prefix`; ours end in a printable character, so the last byte can rise.
    encoded = prefix.encode()
    return encoded[:-1] + bytes([encoded[-1] + 1])
