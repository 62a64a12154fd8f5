"""The store on etcd v3, through aetcd's generated stubs over a TLS channel of our own.

aetcd's own client knows no TLS and one endpoint only; its stubs are etcd's wire format and nothing else (docs/decisions/0003).
Source: https://etcd.io/docs/v3.4/learning/api/.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import grpc
from aetcd import rpc

from fleet.channels import LiveChannel
from fleet.credentials import LiveCredentials
from fleet.errors import BedplateError, ConflictError
from fleet.identity import ETCD_SERVER_NAME, TlsFiles
from fleet.rpc import channel_options
from fleet.store.members import Member, MemberCondition, Members, Stubs
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
# A member that is silent for so long is left for the next one: past a hiccup of its disk, and three fit into CALL_TIMEOUT_S.
ASK_TIMEOUT_S = 1.5
# What was proposed to a leader that died is lost in silence (measured); one that waits for an election is through by then.
TRANSACT_TIMEOUT_S = 3.0
# A lease is renewed when two thirds of it are left: within a fifth each, two members may be silent and the third is asked in time.
RENEWALS_PER_TTL = 5
PAGE_KEYS = 1000
# After a change of certificate calls end on the old channel; watches are opened anew by then: a mirror lists every 30 s.
LINGER_S = 120.0
# etcd closes connections that are pinged more often than its --grpc-keepalive-min-time, 5 s by default.
KEEPALIVE_MS = 6_000
# Also the kernel's TCP_USER_TIMEOUT: what was sent and is not acknowledged for so long ends the connection.
KEEPALIVE_TIMEOUT_MS = 2_000
# gRPC gives a connection attempt at least this long (20 s by default): after a cut the first SYN that gets through is a new one's.
CONNECT_MS = 2_000
# A member that has lost its leader ends the stream instead of keeping it open in silence.
REQUIRE_LEADER = (("hasleader", "true"),)

_OPTIONS = {
    "grpc.keepalive_time_ms": KEEPALIVE_MS,
    "grpc.keepalive_timeout_ms": KEEPALIVE_TIMEOUT_MS,
    "grpc.http2.ping_timeout_ms": KEEPALIVE_TIMEOUT_MS,
    "grpc.http2.min_ping_interval_without_data_ms": KEEPALIVE_MS,
    "grpc.min_reconnect_backoff_ms": CONNECT_MS,
}


def open_etcd(endpoints: Sequence[str], tls: TlsFiles, first: int | None = None) -> "EtcdStore":
    """The store at `endpoints` ("ip:port" each, one cluster), over mutual TLS; connects when first used.

    `first` is the index of the member to begin with; the programs of a fleet spread over them without it.
    """
    options = list({**dict(channel_options(ETCD_SERVER_NAME)), **_OPTIONS}.items())
    credentials = LiveCredentials(tls)

    def member(endpoint: str) -> Member:
        opened = partial(grpc.aio.secure_channel, endpoint, options=options)
        return Member(endpoint, LiveChannel(credentials, opened, LINGER_S))

    return EtcdStore(Members([member(endpoint) for endpoint in endpoints], os.getpid() if first is None else first))


class EtcdStore:
    """fleet.store.port.Store on one member of etcd at a time."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._renew_timeouts_s: dict[int, float] = {}

    async def get(self, key: str) -> KeyValue | None:
        """The key now, or None."""
        reply = await self._ask(_range, rpc.RangeRequest(key=key.encode()))
        return _key_value(reply.kvs[0]) if reply.kvs else None

    async def list_prefix(self, prefix: str, revision: int = 0) -> Listing:
        """Every key under `prefix`, in pages that are all read at `revision`, or at the first page's."""
        start, end = prefix.encode(), _prefix_end(prefix)
        entries: list[KeyValue] = []
        while True:
            request = rpc.RangeRequest(key=start, range_end=end, limit=PAGE_KEYS, revision=revision)
            reply = await self._ask(_range, request)
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
        # Once: the outcome of a transaction whose answer is missing is unknown, and its caller looks again.
        reply = await self._call(lambda stubs: stubs.kv.Txn, request, TRANSACT_TIMEOUT_S)
        return Committed(reply.succeeded, reply.header.revision)

    def watch(self, prefix: str, from_revision: int) -> Watch:
        """Changes under `prefix` since `from_revision`."""
        return self._open_watch(prefix, from_revision)

    async def grant_lease(self, ttl_s: float) -> int:
        """A new lease's id; etcd counts whole seconds and rounds up to its own minimum."""
        request = rpc.LeaseGrantRequest(TTL=max(1, round(ttl_s)))
        reply = await self._ask(lambda stubs: stubs.lease.LeaseGrant, request)
        self._renew_timeouts_s[int(reply.ID)] = min(ttl_s / RENEWALS_PER_TTL, ASK_TIMEOUT_S)
        return int(reply.ID)

    async def renew_lease(self, lease_id: int) -> float:
        """Seconds the lease has to live now; 0.0 when it is gone."""
        timeout_s = self._renew_timeouts_s.get(lease_id, ASK_TIMEOUT_S)
        left_s = (await self._ask(_keep_alive, rpc.LeaseKeepAliveRequest(ID=lease_id), timeout_s)).TTL
        if left_s <= 0:
            self._renew_timeouts_s.pop(lease_id, None)
        return float(max(0, left_s))

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease."""
        self._renew_timeouts_s.pop(lease_id, None)
        try:
            await self._ask(lambda stubs: stubs.lease.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease_id))
        except ConflictError:
            return

    async def compact(self, revision: int) -> None:
        """Forget the history before `revision`."""
        await self._ask(lambda stubs: stubs.kv.Compact, rpc.CompactionRequest(revision=revision))

    async def condition(self) -> MemberCondition:
        """How the member is that answers; of a certain one, ask through a store of that endpoint only."""
        reply = await self._ask(lambda stubs: stubs.maintenance.Status, rpc.StatusRequest())
        is_leader = bool(reply.leader) and reply.leader == reply.header.member_id
        return MemberCondition(is_leader, bool(reply.leader), reply.dbSize, tuple(reply.errors))

    async def close(self) -> None:
        """Close the channels."""
        await self._members.close()

    async def _ask(self, method: "_Method", request: Any, timeout_s: float = ASK_TIMEOUT_S) -> Any:
        """The answer of any member; for what may be asked twice."""
        if len(self._members) == 1:
            return await self._call(method, request, CALL_TIMEOUT_S)
        for _ in range(len(self._members)):
            try:
                return await self._call(method, request, timeout_s)
            except StoreUnavailableError as error:
                if error.code != "store_unavailable":
                    raise
        return await self._call(method, request, timeout_s)

    async def _call(self, method: "_Method", request: Any, timeout_s: float) -> Any:
        member = self._members.current()
        with self._leaving(member):
            reply = await method(member.stubs())(request, timeout=timeout_s)
            member.has_answered = True
            return reply

    @contextmanager
    def _leaving(self, member: Member) -> Iterator[None]:
        try:
            with _translated():
                yield
        except StoreUnavailableError as error:
            if error.code == "store_unavailable":
                self._members.leave(member)
            raise

    @asynccontextmanager
    async def _open_watch(self, prefix: str, from_revision: int) -> AsyncIterator[AsyncIterator[Sequence[WatchEvent]]]:
        creation = rpc.WatchCreateRequest(
            key=prefix.encode(), range_end=_prefix_end(prefix), start_revision=from_revision
        )
        member = self._members.current()
        stream = member.stubs().watch.Watch(metadata=REQUIRE_LEADER)
        member.watches.add(stream)
        try:
            with self._leaving(member):
                await _write_first(stream, rpc.WatchRequest(create_request=creation), ASK_TIMEOUT_S)
            yield self._batches(stream, member)
        finally:
            member.watches.discard(stream)
            stream.cancel()

    async def _batches(self, stream: Any, member: Member) -> AsyncIterator[Sequence[WatchEvent]]:
        while True:
            with self._leaving(member):
                reply = await stream.read()
                if reply is grpc.aio.EOF:
                    raise StoreUnavailableError("store_unavailable", "etcd closed the watch", "resume it")
                if reply.canceled:
                    raise _end_of_watch(reply.compact_revision)
            if reply.events:
                yield [_event(event) for event in reply.events]


_Method = Callable[[Stubs], Any]


def _range(stubs: Stubs) -> Any:
    return stubs.kv.Range


def _keep_alive(stubs: Stubs) -> Any:
    async def once(request: Any, timeout: float) -> Any:  # noqa: ASYNC109 (as grpc's own methods)
        stream = stubs.lease.LeaseKeepAlive(timeout=timeout, metadata=REQUIRE_LEADER)
        try:
            await _write_first(stream, request, timeout)
            reply = await stream.read()
        finally:
            stream.cancel()
        if reply is grpc.aio.EOF:
            raise StoreUnavailableError("store_unavailable", "etcd closed the keep-alive stream", "it is tried again")
        return reply

    return once


async def _write_first(stream: Any, request: Any, timeout_s: float) -> None:
    # grpc.aio waits for ever to write to a stream that is cancelled before its connection stands (measured with 1.85).
    try:
        async with asyncio.timeout(timeout_s):
            await stream.write(request)
    except TimeoutError as error:
        message = f"etcd took no request for {timeout_s:.1f} s"
        raise StoreUnavailableError("store_unavailable", message, "check etcd and the way to it") from error


def _end_of_watch(compact_revision: int) -> BedplateError:
    if compact_revision:
        return CompactedError("compacted", f"revisions before {compact_revision} are compacted", "list again")
    return StoreUnavailableError("store_unavailable", "etcd cancelled the watch", "resume it")


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
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            message = f"etcd takes no writes: {error.details()}"
            next_step = "compact, defragment and disarm its alarm: docs/operator.md, etcd"
            raise StoreUnavailableError("store_full", message, next_step) from error
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
