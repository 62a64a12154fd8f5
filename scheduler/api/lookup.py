"""The snapshot for a call about one sandbox: what any scheduler has acknowledged is in it, also what came a moment ago."""

from contextlib import suppress

from fleet.errors import NotFoundError
from fleet.identity import Identity, Role
from fleet.model.ids import SandboxId, is_dns_label, is_sandbox_id
from fleet.store.keyspace import id_key, name_key
from scheduler.api.access import find_sandbox, tenant_of
from scheduler.placement.snapshot import Snapshot
from scheduler.state import FleetState


async def fresh_with(state: FleetState, caller: Identity, named: str, tenant: str) -> Snapshot:
    """The store as it is now; before a sandbox is called unknown the store itself is asked, for another scheduler may know it.

    Raises UnavailableError `store_unavailable`, or `store_behind` when this scheduler does not see what is there; and what
    `tenant_of` does.
    """
    snapshot = state.fresh()
    with suppress(NotFoundError):
        find_sandbox(snapshot, caller, named, tenant)
        return snapshot
    if is_sandbox_id(named):
        await state.see(id_key(SandboxId(named)))
    if is_dns_label(named) and (tenant or caller.role is Role.TENANT):
        await state.see(name_key(tenant_of(caller, tenant), named))
    return state.fresh()
