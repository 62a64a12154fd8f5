"""SandboxService: wishes are written to the store, answers are read from the mirror once it has them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.codec import decode, encode, to_message
from fleet.errors import ConflictError, InvalidSpecError, NotFoundError
from fleet.gatekeeper import actor_of, caller_of
from fleet.identity import Role
from fleet.model.assignment import Sandbox
from fleet.model.sandbox import SandboxRecord
from fleet.rpc import MESSAGE_BYTES_MAX
from fleet.store.keyspace import record_key, status_key
from fleet.store.port import Put, Store, Unmoved
from scheduler import events
from scheduler.api import wishes
from scheduler.api.access import find_sandbox, tenant_of
from scheduler.api.creations import Creations
from scheduler.api.limits import WriteLimit
from scheduler.api.lookup import fresh_with
from scheduler.api.relay import Slots
from scheduler.api.view import brief, view, view_removed, views_of
from scheduler.api.wishes import Wish
from scheduler.placement.snapshot import Snapshot
from scheduler.state import FleetState

# A record is changed by its owner only: losing this many races in a row takes several clients that fight over one sandbox.
ATTEMPTS_MAX = 5
# Of one caller; a watch costs a look at each change of anything.
WATCHES_MAX = 1000
# Room for the message around a listing's sandboxes.
LISTING_BYTES_MAX = MESSAGE_BYTES_MAX - 64 * 1024

# A thousand sandboxes take 150 ms of the only thread to list: one caller has so many listings under way, and others have their turn
# after so many sandboxes of each (2 ms).
LISTINGS_MAX, LISTED_AT_ONCE = 8, 16


class SandboxService(service_pb2_grpc.SandboxServiceServicer):
    """Create, get, list, watch, stop, start and destroy sandboxes."""

    def __init__(
        self,
        store: Store,
        state: FleetState,
        now_ms: Callable[[], int],
        writes: WriteLimit,
        creations: Creations,
    ) -> None:
        self._creations = creations
        self._writes = writes
        self._store = store
        self._state = state
        self._now_ms = now_ms
        self._watches = Slots("watches", WATCHES_MAX)
        self._listings = Slots("listings", LISTINGS_MAX)

    async def CreateSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's names)
        """Writes the wish if its id is new; the same wish again gives the same sandbox, whatever has become of it."""
        return await self._creations.create(request, context)

    async def CreateSandboxes(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The same for many at once, each with an answer of its own."""
        return await self._creations.create_all(request, context)

    async def GetSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The sandbox as it is now."""
        snapshot, record = await self._look_up(request, context)
        return to_message(view(record, snapshot))

    async def ListSandboxes(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A tenant's sandboxes, or every tenant's for an operator who names none; without commands, prompts and env."""
        self._listings.take(context)
        caller = caller_of(context)
        is_all = caller.role is Role.OPERATOR and not request.tenant
        tenant = None if is_all else tenant_of(caller, request.tenant)
        sandboxes: list[Any] = []
        for one in views_of(self._state.fresh(), tenant):
            sandboxes.append(to_message(brief(one)))
            if not len(sandboxes) % LISTED_AT_ONCE:
                await asyncio.sleep(0)
        response = service_pb2.ListSandboxesResponse(sandboxes=sandboxes)
        if response.ByteSize() > LISTING_BYTES_MAX:
            message = f"{len(sandboxes)} sandboxes are too many for one listing"
            raise InvalidSpecError("listing_too_large", message, "name one tenant, or destroy some", field="tenant")
        return response

    async def WatchSandbox(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """The sandbox now and after every change; changes that come faster than they are read are seen as one."""
        self._watches.take(context)
        _, record = await self._look_up(request, context)
        last = None
        while True:
            changed = self._state.changed()
            snapshot = self._state.snapshot()
            found = snapshot.records.get(record.sandbox_id)
            current = view(found or record, snapshot)
            if found is None:
                if record.sandbox_id not in snapshot.opaque_sandboxes:
                    yield to_message(view_removed(last or current))
                    return
            elif current != last:
                yield to_message(current)
                last = current
            await changed.wait()

    async def StopSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Ends the VM; its disk, output and artifact stay until the sandbox is destroyed. What has ended stays as it is."""
        return to_message(await self._change(request, context, wishes.stop, "StopSandbox"))

    async def StartSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Begins the next run of a stopped sandbox; it waits for room on the host that has its disk."""
        return to_message(await self._change(request, context, wishes.start, "StartSandbox"))

    async def DestroySandbox(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Begins to remove every trace; the name is free once it is gone."""
        return to_message(await self._change(request, context, wishes.remove, "DestroySandbox"))

    async def _look_up(self, request: Any, context: Any) -> tuple[Snapshot, SandboxRecord]:
        caller = caller_of(context)
        snapshot = await fresh_with(self._state, caller, request.sandbox, request.tenant)
        return snapshot, find_sandbox(snapshot, caller, request.sandbox, request.tenant)

    async def _change(self, request: Any, context: Any, wish: Wish, cause: str) -> Sandbox:
        self._writes.take(context)
        _, record = await self._look_up(request, context)
        key = record_key(record.tenant, record.sandbox_id)
        for _ in range(ATTEMPTS_MAX):
            known = await self._store.get(key)
            if known is None:
                message = f"sandbox {record.spec.name} is removed already"
                raise NotFoundError("sandbox_unknown", message, "mb ls shows those there are")
            current = decode(SandboxRecord, known.value)
            snapshot = await self._state.seen(known.mod_revision)
            wanted = wish(current, snapshot)
            if wanted == current:
                return await self._seen(current, known.mod_revision)
            # What the wish was decided on: whether its host says that the sandbox has ended.
            status = _status_of(current, snapshot)
            self._writes.charge(context, len(known.value))
            told = events.goal_changed(current, wanted, actor_of(context), cause, self._now_ms())
            writes = [Put(key, encode(wanted)), *told]
            committed = await self._store.transact([Unmoved(key, known.mod_revision), *status], writes)
            if committed.is_committed:
                return await self._seen(wanted, committed.revision)
            for moved in [await self._store.get(one.key) for one in status]:
                await self._state.seen(moved.mod_revision if moved is not None else 0)
        raise ConflictError("record_moved", f"sandbox {record.spec.name} is changed by others too", "try again")

    async def _seen(self, record: SandboxRecord, revision: int) -> Sandbox:
        """The sandbox once the mirror has what was written, so that whoever wrote also reads it."""
        snapshot = await self._state.seen(revision)
        found = snapshot.records.get(record.sandbox_id)
        return view(found, snapshot) if found is not None else view_removed(view(record, snapshot))


def _status_of(record: SandboxRecord, snapshot: Snapshot) -> list[Unmoved]:
    assignment = snapshot.assignment_of(record)
    if assignment is None:
        return []
    key = status_key(assignment.host_id, assignment.sandbox_id)
    return [Unmoved(key, snapshot.mod_revisions.get(key, 0))]
