"""EventService: what happened to sandboxes, from the store and from every host that has to do with them, as one stream.

What is there comes in the order of its time; with follow, what happens comes as it is heard of. An event is known by its origin
and number, and told once. A host that is away is left out until it is back: then what it has recorded meanwhile comes late.
"""

import asyncio
import heapq
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bedplate.sandbox.v1 import event_pb2, event_pb2_grpc
from fleet.codec import to_message
from fleet.errors import BedplateError, NotFoundError, UnavailableError
from fleet.gatekeeper import caller_of
from fleet.identity import Identity
from fleet.model.ids import HostId, SandboxId, Tenant, is_sandbox_id
from fleet.model.sandbox import SandboxRecord
from fleet.rpc import responses
from fleet.store.keyspace import events_of
from fleet.store.port import CompactedError, EventKind, KeyValue, Store, StoreUnavailableError
from scheduler.api.access import find_sandbox, tenant_of
from scheduler.api.channels import HostChannels
from scheduler.api.lookup import fresh_with
from scheduler.api.relay import Slots, calling
from scheduler.events import ORIGIN, REMOVED, first_seq, read_event
from scheduler.placement.snapshot import Snapshot
from scheduler.state import FleetState

# One caller's: a stream to each host that has to do with it.
READS_MAX = 32
# The newest that one call tells of what is there: 10 MB in memory, hours of a busy tenant.
EVENTS_MAX = 20_000
# Hosts asked at the same time for what is there, and how long one may take: it reads a bounded file.
HOSTS_AT_ONCE = 64
HOST_TIMEOUT_S = 3.0
FOLLOW_ROUND_S = 300.0
RETRY_S = 1.0
# Heard and not yet passed on; past it the hosts and the store wait for the client.
QUEUE_MAX = 256

Tell = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose events: one sandbox's, or all of a tenant's."""

    tenant: Tenant
    sandbox_id: SandboxId | None
    since_ms: int = 0

    def includes(self, event: Any) -> bool:
        """Whether an event is one of those."""
        is_whose = event.tenant == self.tenant and self.sandbox_id in (None, event.sandbox_id)
        return is_whose and event.at_ms >= self.since_ms


class EventService(event_pb2_grpc.EventServiceServicer):
    """Events of one sandbox, also of one that was removed a while ago, or of all of a tenant's."""

    def __init__(self, store: Store, state: FleetState, channels: HostChannels) -> None:
        self._store = store
        self._state = state
        self._channels = channels
        self._reads = Slots("reads of events", READS_MAX)

    async def ReadEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 (the stub's name)
        """What is there, the oldest first; with follow also what comes, until the one sandbox that was asked for is removed."""
        self._reads.take(context)
        caller, snapshot = caller_of(context), self._state.fresh()
        if request.sandbox:
            snapshot = await fresh_with(self._state, caller, request.sandbox, request.tenant)
        asked = find_asked(snapshot, caller, request)
        reading = _Reading(self._store, self._state, self._channels, asked)
        record = _record_of(snapshot, asked)
        found = await reading.there()
        if asked.sandbox_id is not None and record is None and not found and not reading.has_history:
            message = f"tenant {asked.tenant} has no sandbox {asked.sandbox_id!r}"
            raise NotFoundError("sandbox_unknown", message, "mb ls shows those there are")
        for event in found:
            yield event
        is_gone = record is None or reading.removed_at_ms >= record.created_at_ms
        if request.follow and not (asked.sandbox_id is not None and is_gone):
            async for event in reading.follow():
                yield event


def find_asked(snapshot: Snapshot, caller: Identity, request: Any) -> Asked:
    """What a request is for; an id that no sandbox has may be one that was removed."""
    if not request.sandbox:
        return Asked(tenant_of(caller, request.tenant), None, request.since_ms)
    try:
        record = find_sandbox(snapshot, caller, request.sandbox, request.tenant)
    except NotFoundError:
        if not is_sandbox_id(request.sandbox):
            raise
        return Asked(tenant_of(caller, request.tenant), SandboxId(request.sandbox), request.since_ms)
    return Asked(record.tenant, record.sandbox_id, request.since_ms)


def concerned(snapshot: Snapshot, asked: Asked) -> set[HostId]:
    """The hosts that may have recorded something: a sandbox's own; all, where it was removed or a whole tenant is asked for."""
    record = _record_of(snapshot, asked)
    if record is None:
        return set(snapshot.hosts)
    assignment = snapshot.assignment_of(record)
    return {assignment.host_id} if assignment is not None else set()


def _record_of(snapshot: Snapshot, asked: Asked) -> SandboxRecord | None:
    found = snapshot.records.get(asked.sandbox_id) if asked.sandbox_id is not None else None
    return found if found is not None and found.tenant == asked.tenant else None


class _Reading:
    """One call: what it was asked, and how far it has told each origin's events."""

    def __init__(self, store: Store, state: FleetState, channels: HostChannels, asked: Asked) -> None:
        self._store = store
        self._state = state
        self._channels = channels
        self._asked = asked
        self._told: dict[str, tuple[int, int]] = {}
        self._store_seq = -1
        self._followed: set[HostId] = set()
        self.has_history = False
        self.removed_at_ms = -1

    async def there(self) -> list[Any]:
        """What is there, in the order of its time; raises UnavailableError when neither the store nor any host can be read."""
        snapshot = self._state.snapshot()
        hosts = sorted(concerned(snapshot, self._asked) & snapshot.alive)
        gate, newest = asyncio.Semaphore(HOSTS_AT_ONCE), _Newest()
        reads = [self._read_store(newest), *(self._read_host(gate, host_id, newest) for host_id in hosts)]
        errors = await asyncio.gather(*reads)
        if all(error is not None for error in errors) and errors[0] is not None:
            raise errors[0]
        found = newest.in_order()
        for event in found:
            self._note(event)
        return found

    async def follow(self) -> AsyncIterator[Any]:
        """What happens from now on."""
        queue: asyncio.Queue[Any] = asyncio.Queue(QUEUE_MAX)
        hearing = asyncio.create_task(self._hear(queue.put))
        try:
            while True:
                event = await _next(queue, hearing)
                if event.kind == REMOVED and event.origin == ORIGIN and self._asked.sandbox_id is not None:
                    break
                yield event
            # What its host recorded before it said that it is gone may still be on its way.
            await _end(hearing)
            while not queue.empty():
                yield queue.get_nowait()
            for late in await self._there_late():
                yield late
            yield event
        finally:
            await _end(hearing)

    async def _there_late(self) -> list[Any]:
        gate, newest = asyncio.Semaphore(HOSTS_AT_ONCE), _Newest()
        await asyncio.gather(*(self._read_host(gate, host_id, newest) for host_id in sorted(self._followed)))
        return [event for event in newest.in_order() if self._is_new(event)]

    async def _read_store(self, newest: "_Newest") -> BedplateError | None:
        try:
            listing = await self._store.list_prefix(self._prefix)
        except BedplateError as error:
            return error
        self._store_seq = first_seq(listing.revision + 1) - 1
        for event in filter(None, map(read_event, listing.entries)):
            self.has_history = True
            if event.kind == REMOVED:
                self.removed_at_ms = max(self.removed_at_ms, event.at_ms)
            if self._asked.includes(event):
                newest.add(to_message(event))
        return None

    async def _read_host(self, gate: asyncio.Semaphore, host_id: HostId, newest: "_Newest") -> BedplateError | None:
        async with gate:
            try:
                async for message in self._from_host(host_id, self._asked.since_ms, HOST_TIMEOUT_S, is_followed=False):
                    newest.add(message)
            except BedplateError as error:
                return error
        return None

    async def _hear(self, tell: Tell) -> None:
        """Follows the store, and each host from when it has to do with what was asked."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_store(tell))
            while True:
                changed = self._state.changed()
                for host_id in concerned(self._state.snapshot(), self._asked) - self._followed:
                    self._followed.add(host_id)
                    group.create_task(self._follow_host(host_id, tell))
                await changed.wait()

    async def _follow_store(self, tell: Tell) -> None:
        while True:
            try:
                listing = await self._store.list_prefix(self._prefix)
                missed = [one for one in self._from_store(listing.entries) if one.seq > self._store_seq]
                for message in sorted(missed, key=lambda one: one.seq):
                    await tell(message)
                self._store_seq = first_seq(listing.revision + 1) - 1
                await self._watch_store(listing.revision + 1, tell)
            except (StoreUnavailableError, CompactedError):
                await asyncio.sleep(RETRY_S)

    async def _watch_store(self, from_revision: int, tell: Tell) -> None:
        async with self._store.watch(self._prefix, from_revision) as batches:
            async for batch in batches:
                puts = [event for event in batch if event.kind is EventKind.PUT]
                entries = [KeyValue(one.key, one.value, 0, one.mod_revision) for one in puts]
                for message in self._from_store(entries):
                    # A removal puts the earlier events again, each with the number that it has.
                    if message.seq > self._store_seq:
                        await tell(message)
                if batch:
                    self._store_seq = first_seq(batch[-1].mod_revision + 1) - 1

    async def _follow_host(self, host_id: HostId, tell: Tell) -> None:
        while True:
            changed = self._state.changed()
            if host_id not in self._state.snapshot().alive:
                await changed.wait()
                continue
            _, since_ms = self._told.get(f"host/{host_id}", (0, self._asked.since_ms))
            try:
                async for message in self._from_host(host_id, since_ms, FOLLOW_ROUND_S, is_followed=True):
                    if self._is_new(message):
                        await tell(message)
                        self._note(message)
                await asyncio.sleep(RETRY_S)
            except UnavailableError as error:
                if error.code != "deadline_exceeded":
                    await asyncio.sleep(RETRY_S)
            except BedplateError:
                await asyncio.sleep(RETRY_S)

    async def _from_host(
        self, host_id: HostId, since_ms: int, timeout_s: float, *, is_followed: bool
    ) -> AsyncIterator[Any]:
        stub: Any = event_pb2_grpc.EventServiceStub(self._channels.channel(self._state.snapshot(), host_id))
        wanted = event_pb2.ReadEventsRequest(
            sandbox=self._asked.sandbox_id or "", tenant=self._asked.tenant, follow=is_followed, since_ms=since_ms
        )
        call = stub.ReadEvents(wanted, timeout=timeout_s)
        try:
            with calling(host_id):
                async for message in responses(call):
                    # A host speaks for itself, and of what it was asked.
                    if message.origin == f"host/{host_id}" and self._asked.includes(message):
                        yield message
        finally:
            call.cancel()

    def _from_store(self, entries: Iterable[KeyValue]) -> list[Any]:
        read = [read_event(entry) for entry in entries]
        return [to_message(event) for event in read if event is not None and self._asked.includes(event)]

    @property
    def _prefix(self) -> str:
        return events_of(self._asked.tenant, self._asked.sandbox_id)

    def _is_new(self, event: Any) -> bool:
        """Whether an event was not told yet; a host that has lost its record counts anew, at a later time."""
        seq, at_ms = self._told.get(event.origin, (-1, -1))
        return bool(event.seq > seq or event.at_ms > at_ms)

    def _note(self, event: Any) -> None:
        if self._is_new(event):
            self._told[event.origin] = (event.seq, event.at_ms)


class _Newest:
    """The EVENTS_MAX newest of the events that are added."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, str, int, str, int, Any]] = []
        self._added = 0

    def add(self, event: Any) -> None:
        self._added += 1
        one = (event.at_ms, event.origin, event.seq, event.sandbox_id, self._added, event)
        if len(self._heap) < EVENTS_MAX:
            heapq.heappush(self._heap, one)
        else:
            heapq.heappushpop(self._heap, one)

    def in_order(self) -> list[Any]:
        return [one[-1] for one in sorted(self._heap, key=lambda one: one[:-1])]


async def _next(queue: asyncio.Queue[Any], hearing: asyncio.Task[None]) -> Any:
    getting = asyncio.create_task(queue.get())
    try:
        await asyncio.wait({getting, hearing}, return_when=asyncio.FIRST_COMPLETED)
        if getting.done():
            return getting.result()
        await hearing
        raise UnavailableError("events_cut", "the scheduler stopped to listen", "read on with a later time")
    finally:
        getting.cancel()


async def _end(hearing: asyncio.Task[None]) -> None:
    hearing.cancel()
    await asyncio.wait({hearing})
