"""Finds the sandbox that a request is about: by id, and only for its tenant."""

from fleet.errors import NotFoundError
from fleet.model.assignment import Assignment
from fleet.model.ids import SandboxId, Tenant
from hostd.orders import Orders


def find_order(orders: Orders, sandbox: str, tenant: str) -> Assignment:
    """The order of a tenant's sandbox on this host; raises NotFoundError `sandbox_unknown`."""
    sandbox_id = SandboxId(sandbox)
    order = orders.orders.get(sandbox_id)
    if order is None or sandbox_id not in orders.progress or order.tenant != Tenant(tenant):
        raise NotFoundError("sandbox_unknown", f"sandbox {sandbox[:40]} is not on this host", "see mb ls")
    return order
