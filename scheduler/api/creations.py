"""Creations: accepted and placed in one transaction on the scheduler that leads, else written as a wish that it will place."""

import asyncio
from collections.abc import Awaitable, Callable
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
from scheduler.api.admission import check_id, check_room, check_spec, explain_conflict, id_reused
from scheduler.api.limits import WriteLimit
from scheduler.api.view import view, view_removed
from scheduler.commit import creation_of
from scheduler.quotas import Quotas
from scheduler.state import FleetState
from scheduler.submissions import Submissions

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
        return to_message(await self._create(request, caller, tenant_of(caller, request.tenant), actor_of(context)))

    async def create_all(self, request: Any, context: Any) -> Any:
        """The sandbox or the error of each creation, in their order; raises InvalidSpecError for too many of them."""
        if len(request.creations) > CREATIONS_MAX:
            message = f"{len(request.creations)} creations are more than {CREATIONS_MAX}"
            raise InvalidSpecError("creations_too_many", message, "send them in several calls", field="creations")
        caller, actor = caller_of(context), actor_of(context)
        tenant = tenant_of(caller, request.tenant)
        ways = (_result(self._create(one, caller, tenant, actor)) for one in request.creations)
        return service_pb2.CreateSandboxesResponse(results=await asyncio.gather(*ways))

    async def _create(self, request: Any, caller: Identity, tenant: Tenant, actor: str) -> Sandbox:
        self._writes.take_for(caller)
        sandbox_id = check_id(request.sandbox_id)
        check_size(request.spec)
        spec = from_message(SandboxSpec, request.spec)
        if sandbox_id in self._state.snapshot().records:
            # What is known here may have gone since: the store says.
            known = await self._store.get(record_key(tenant, sandbox_id))
            if known is not None:
                record = decode(SandboxRecord, known.value)
                if record.spec != spec:
                    raise id_reused(sandbox_id)
                return await self._seen(record, known.mod_revision)
        snapshot = self._state.fresh()
        check_spec(snapshot, tenant, spec)
        check_room(snapshot, tenant, self._submissions.queued_of(tenant), self._quotas.sandboxes_per_tenant)
        self._writes.charge_for(caller, request.spec.ByteSize())
        return await self._write(SandboxRecord(sandbox_id, tenant, spec, Goal.RUN, 1, self._now_ms()), actor)

    async def _write(self, record: SandboxRecord, actor: str) -> Sandbox:
        if self._submissions.is_open:
            try:
                async with asyncio.timeout(PLACED_TIMEOUT_S):
                    revision = await self._submissions.offer(record, actor).answer
                if revision is not None:
                    return await self._seen(record, revision)
            except TimeoutError:
                # It may have been written at the last moment: then the next transaction finds it, and it is the same.
                pass
        return await self._write_alone(record, actor)

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
        snapshot = await self._state.seen(revision)
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


async def _result(creation: Awaitable[Sandbox]) -> Any:
    try:
        return service_pb2.CreationResult(sandbox=to_message(await creation))
    except BedplateError as error:
        status = next((status.name for family, status in STATUS if isinstance(error, family)), "INTERNAL")
        told = service_pb2.CallError(status=status, code=error.code, message=error.message, next_step=error.next_step)
        told.field = error.field if isinstance(error, InvalidSpecError) else ""
        return service_pb2.CreationResult(error=told)
