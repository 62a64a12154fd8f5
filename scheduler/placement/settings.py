"""What an operator sets of how is placed; a part of every decision. PURE."""

from dataclasses import dataclass, field

from fleet.model.ids import Tenant
from scheduler.placement.weights import Weights


@dataclass(frozen=True, slots=True)
class Settings:
    """Weights of the scores' terms, and how much of the fleet each tenant is due beside the others: 1 unless it is said."""

    weights: Weights = field(default_factory=Weights)
    tenants: tuple[tuple[Tenant, int], ...] = ()

    def due_to(self, tenant: Tenant) -> int:
        """How many ordinary tenants' part of the fleet is due to it."""
        return dict(self.tenants).get(tenant, 1)
