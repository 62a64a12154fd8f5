"""Whose sandboxes a caller may name, and which one it means. PURE; never tells one tenant what another has."""

from fleet.errors import InvalidSpecError, NotFoundError, NotPermittedError
from fleet.identity import Identity, Role
from fleet.model.ids import SandboxId, Tenant, is_dns_label
from fleet.model.sandbox import SandboxRecord
from scheduler.placement.snapshot import Snapshot

NAME_CHARS_SHOWN = 80


def tenant_of(caller: Identity, named: str) -> Tenant:
    """The tenant a call acts for: a tenant's own, the one an operator names.

    Raises NotPermittedError when a tenant names another one, InvalidSpecError when an operator names none.
    """
    if caller.role is Role.TENANT:
        if named not in ("", caller.name):
            message = f"a certificate of tenant {caller.name} acts for that tenant only"
            raise NotPermittedError("tenant_not_permitted", message, "leave the tenant out, or use its certificate")
        return Tenant(caller.name)
    if not named:
        message = "an operator's call must say for which tenant it is"
        raise InvalidSpecError("tenant_missing", message, "name a tenant with --tenant", field="tenant")
    if not is_dns_label(named):
        message = f"{named[:NAME_CHARS_SHOWN]!r} is no tenant's name"
        raise InvalidSpecError("tenant_invalid", message, "use 1 to 63 characters of a-z, 0-9 and -", field="tenant")
    return Tenant(named)


def find_sandbox(snapshot: Snapshot, caller: Identity, named: str, tenant: str) -> SandboxRecord:
    """The sandbox of that id, or of that name within the tenant; an operator may leave the tenant out with an id.

    Raises NotFoundError `sandbox_unknown`, the same for what does not exist and what is another tenant's.
    """
    record = snapshot.records.get(SandboxId(named))
    if caller.role is Role.OPERATOR and not tenant and record is not None:
        return record
    owner = tenant_of(caller, tenant)
    if record is None or record.tenant != owner:
        sandbox_id = snapshot.names.get((owner, named))
        record = snapshot.records.get(sandbox_id) if sandbox_id is not None else None
    if record is None or record.tenant != owner:
        message = f"tenant {owner} has no sandbox {named[:NAME_CHARS_SHOWN]!r}"
        raise NotFoundError("sandbox_unknown", message, "mb ls shows those there are")
    return record
