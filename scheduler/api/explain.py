"""ExplainService: why a sandbox is where it is, as of now or as of its decision, which is then made again and compared.

Operators read hosts' names. A tenant reads how many hosts there were, the terms of their scores and the name of its own host:
where other hosts stand is not for it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bedplate.sandbox.v1 import explain_pb2_grpc
from fleet.codec import to_message
from fleet.gatekeeper import caller_of
from fleet.identity import Role
from fleet.model.explanation import PlacementExplanation
from fleet.model.ids import NO_HOST, HostId
from fleet.model.sandbox import SandboxRecord
from fleet.store.port import Store
from scheduler.api.access import find_sandbox
from scheduler.api.lookup import fresh_with
from scheduler.api.relay import Slots
from scheduler.placement.explanation import Explanation
from scheduler.placement.plan import explain_now
from scheduler.placement.snapshot import Snapshot
from scheduler.recompute import recompute
from scheduler.state import FleetState

# An explanation looks at every host, a past one at the whole store as it was: one caller asks a few at a time, and past
# decisions are made again one after the other.
EXPLANATIONS_MAX = 4
HOSTS_SHOWN = 10


class ExplainService(explain_pb2_grpc.ExplainServiceServicer):
    """Explains placements and refusals."""

    def __init__(self, store: Store, state: FleetState, now_ms: Callable[[], int]) -> None:
        self._store = store
        self._state = state
        self._now_ms = now_ms
        self._slots = Slots("explanations", EXPLANATIONS_MAX)
        self._gate = asyncio.Semaphore(1)

    async def Explain(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's name)
        """The chosen host and the runners-up with every term, or what excludes each host and what would make it fit."""
        self._slots.take(context)
        caller = caller_of(context)
        snapshot = await fresh_with(self._state, caller, request.sandbox, request.tenant)
        record = find_sandbox(snapshot, caller, request.sandbox, request.tenant)
        told = _decided(snapshot, record)
        if request.recompute:
            async with self._gate:
                found = await recompute(self._store, told.cycle, record.sandbox_id, self._state.settings)
            told = replace(told, is_then=True, checks=found.checks, revision=found.record.revision)
            told = _with(told, found.explanation) if found.explanation is not None else told
        else:
            told = _with(told, explain_now(snapshot, self._state.cluster(self._now_ms()), record))
        return to_message(told if caller.role is Role.OPERATOR else _without_names(told))


def _decided(snapshot: Snapshot, record: SandboxRecord) -> PlacementExplanation:
    """What was decided about it last."""
    assignment, refusal = snapshot.assignment_of(record), snapshot.refusals.get(record.sandbox_id)
    host_id, cycle, at_ms = NO_HOST, "", 0
    if assignment is not None:
        host_id, cycle, at_ms = assignment.host_id, assignment.cycle, assignment.assigned_at_ms
    elif refusal is not None:
        cycle, at_ms = refusal.cycle, refusal.at_ms
    name = record.spec.name
    return PlacementExplanation(record.sandbox_id, name, host_id, cycle, at_ms, False, 0, 0, (), (), ())


def _with(told: PlacementExplanation, found: Explanation) -> PlacementExplanation:
    return replace(
        told,
        considered=found.considered,
        able=found.able,
        ranking=found.ranking[:HOSTS_SHOWN],
        excluded=found.excluded,
        reasons=found.reasons,
    )


def _without_names(told: PlacementExplanation) -> PlacementExplanation:
    def own(host_id: HostId) -> HostId:
        return host_id if host_id == told.host_id else NO_HOST

    ranking = tuple(replace(one, host_id=own(one.host_id)) for one in told.ranking)
    return replace(told, ranking=ranking, excluded=tuple(replace(one, host_ids=()) for one in told.excluded))
