"""Creations: accepted and placed in one transaction on the scheduler that leads, else written as a wish that it will place."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from bedplate.sandbox.v1 import service_pb2
from fleet.codec import decode, from_message, to_message
from fleet.errors import BedplateError, InvalidSpecError
from fleet.gatekeeper import actor_of, caller_of
from fleet.identity import Identity
from fleet.model.assignment import Sandbox
from fleet.model.ids import SandboxId, Tenant
from fleet.model.sandbox import Goal, SandboxRecord, SandboxSpec
from fleet.rpc import STATUS
from fleet.store.keyspace import record_key
from fleet.store.port import Store
from scheduler.api.access import tenant_of
from scheduler.api.admission import check_id, check_lineage, check_room, check_spec, explain_conflict, id_reused
from scheduler.api.limits import WriteLimit
from scheduler.api.view import view, view_removed
from scheduler.commit import creation_of
from scheduler.placement.snapshot import Snapshot
from scheduler.quotas import Quotas
from scheduler.state import FleetState
from scheduler.submissions import Submission, Submissions

# Of one CreateSandboxes: a message of specs of ordinary size, answered within a few transactions.
CREATIONS_MAX = 256
# Ten times what admission lets through: what is within is refused by name, and looked at in milliseconds.
PARTS_MAX = 10_000
# A plan and its commit take milliseconds; a creation that waited longer is written alone.
PLACED_TIMEOUT_S = 5.0


class Creations:
    """Writes wishes, each once by its id."""

    def __init__(
        self,
        store: Store,
        state: FleetState,
        now_ms: Callable[[], int],
        writes: WriteLimit,
        *,
        submissions: Submissions,
        quotas: Quotas,
    ) -> None:
        self._store = store
        self._state = state
        self._now_ms = now_ms
        self._writes = writes
        self._submissions = submissions
        self._quotas = quotas

    async def create(self, request: Any, context: Any) -> Any:
        """The sandbox of one CreateSandboxRequest: the same wish again gives the same sandbox, whatever has become of it."""
        caller = caller_of(context)
        tenant = tenant_of(caller, request.tenant)
        (made,) = await self._create_all([request], caller, tenant, actor_of(context))
        if isinstance(made, BedplateError):
            raise made
        return to_message(made)

    async def create_all(self, request: Any, context: Any) -> Any:
        """The sandbox or the error of each creation, in their order; raises InvalidSpecError for too many of them."""
        if len(request.creations) > CREATIONS_MAX:
            message = f"{len(request.creations)} creations are more than {CREATIONS_MAX}"
            raise InvalidSpecError("creations_too_many", message, "send them in several calls", field="creations")
        caller = caller_of(context)
        tenant = tenant_of(caller, request.tenant)
        made = await self._create_all(request.creations, caller, tenant, actor_of(context))
        return service_pb2.CreateSandboxesResponse(results=map(_result, made))

    async def _create_all(
        self, requests: Sequence[Any], caller: Identity, tenant: Tenant, actor: str
    ) -> list[Sandbox | BedplateError]:
        """Each one's sandbox or error. Those that can be placed at once wait together: a burst costs no task for each."""
        made: dict[int, Sandbox | BedplateError] = {}
        offered: dict[int, Submission] = {}
        alone: dict[int, Callable[[], Coroutine[Any, Any, Sandbox]]] = {}
        for place, request in enumerate(requests):
            try:
                record = self._admit(request, caller, tenant)
                if record.sandbox_id in self._state.snapshot().records:
                    alone[place] = partial(self._write_again, record, actor)
                elif self._submissions.is_open:
                    offered[place] = self._submissions.offer(record, actor)
                else:
                    alone[place] = partial(self._write_alone, record, actor)
            except BedplateError as error:
                made[place] = error
        for place, outcome in (await self._placed(offered)).items():
            if outcome is None:
                alone[place] = partial(self._write_alone, offered[place].record, actor)
            else:
                made[place] = outcome
        found = await asyncio.gather(*(write() for write in alone.values()), return_exceptions=True)
        for place, one in zip(alone, found, strict=True):
            if isinstance(one, BaseException) and not isinstance(one, BedplateError):
                raise one
            made[place] = one
        return [made[place] for place in range(len(requests))]

    def _admit(self, request: Any, caller: Identity, tenant: Tenant) -> SandboxRecord:
        """The record that a creation asks for; raises what stands in the way of it whatever the store says."""
        self._writes.take_for(caller)
        sandbox_id = check_id(request.sandbox_id)
        check_size(request.spec)
        spec = from_message(SandboxSpec, request.spec)
        snapshot = self._state.fresh()
        # A creation that comes again is answered by what has become of the first.
        known = snapshot.records.get(sandbox_id)
        ancestors = known.ancestors if known is not None else ()
        if known is None:
            check_spec(snapshot, tenant, spec)
            ancestors = check_lineage(snapshot, tenant, spec)
            check_room(snapshot, tenant, self._submissions.queued_of(tenant), self._quotas.sandboxes_per_tenant)
            self._writes.charge_for(caller, request.spec.ByteSize())
        return SandboxRecord(sandbox_id, tenant, spec, Goal.RUN, 1, self._now_ms(), ancestors=ancestors)

    async def _placed(self, offered: Mapping[int, Submission]) -> dict[int, Sandbox | BedplateError | None]:
        """What became of the submissions; None for one that is to be written alone."""
        if not offered:
            return {}
        # What is still waiting then may be written at the last moment: the next transaction finds it, and it is the same.
        await asyncio.wait([one.answer for one in offered.values()], timeout=PLACED_TIMEOUT_S)
        revisions, made = dict[int, int](), dict[int, Sandbox | BedplateError | None]()
        for place, one in offered.items():
            error = one.answer.exception() if one.answer.done() else None
            if isinstance(error, BedplateError):
                made[place] = error
            elif one.answer.done() and (revision := one.answer.result()) is not None:
                revisions[place] = revision
            else:
                one.answer.cancel()
                made[place] = None
        if revisions:
            snapshot = await self._state.seen(max(revisions.values()))
            made |= {place: _view(snapshot, offered[place].record) for place in revisions}
        return made

    async def _write_again(self, record: SandboxRecord, actor: str) -> Sandbox:
        """What became of an id that is known here; what is known here may have gone since: the store says."""
        known = await self._store.get(record_key(record.tenant, record.sandbox_id))
        if known is None:
            return await self._write_alone(record, actor)
        there = decode(SandboxRecord, known.value)
        if there.spec != record.spec:
            raise id_reused(record.sandbox_id)
        return await self._seen(there, known.mod_revision)

    async def _write_alone(self, record: SandboxRecord, actor: str) -> Sandbox:
        creation = creation_of(record, actor)
        committed = await self._store.transact(creation.unmoved, creation.writes)
        if committed.is_committed:
            return await self._seen(record, committed.revision)
        # Read one by one, so each may be of another moment: good enough to explain, and nothing is written on it.
        known, claim, name, tombstone = [await self._store.get(condition.key) for condition in creation.unmoved]
        rival = decode(SandboxRecord, known.value) if known is not None else None
        if known is not None and rival is not None and rival.spec == record.spec:
            return await self._seen(rival, known.mod_revision)
        raise explain_conflict(
            record,
            is_destroyed=tombstone is not None and tombstone.value == record.tenant.encode(),
            is_claimed=claim is not None or tombstone is not None,
            name_holder=SandboxId(name.value.decode()) if name is not None else None,
        )

    async def _seen(self, record: SandboxRecord, revision: int) -> Sandbox:
        """The sandbox once the mirror has what was written, so that whoever wrote also reads it."""
        return _view(await self._state.seen(revision), record)


def _view(snapshot: Snapshot, record: SandboxRecord) -> Sandbox:
    found = snapshot.records.get(record.sandbox_id)
    return view(found, snapshot) if found is not None else view_removed(view(record, snapshot))


def check_size(spec: Any) -> None:
    """Raises InvalidSpecError for a spec of more parts than decoding and admission may hold the event loop for."""
    network = spec.network
    lists = (spec.agents, spec.sources, spec.require_labels, spec.secrets, network.egress_allow, network.forwards)
    parts = sum(map(len, lists))
    if parts <= PARTS_MAX:
        parts += sum(len(agent.command) + len(agent.env) for agent in spec.agents)
    if parts > PARTS_MAX:
        next_step = "send fewer agents, sources, variables or arguments"
        raise InvalidSpecError("spec_too_large", f"it has more than {PARTS_MAX} parts", next_step, field="spec")


def _result(made: Sandbox | BedplateError) -> Any:
    if isinstance(made, Sandbox):
        return service_pb2.CreationResult(sandbox=to_message(made))
    status = next((status.name for family, status in STATUS if isinstance(made, family)), "INTERNAL")
    told = service_pb2.CallError(status=status, code=made.code, message=made.message, next_step=made.next_step)
    told.field = made.field if isinstance(made, InvalidSpecError) else ""
    return service_pb2.CreationResult(error=told)
