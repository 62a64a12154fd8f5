"""How much one tenant, one caller and the queue may ask of a scheduler: the section [limits] of its configuration."""

from dataclasses import dataclass

# One tenant's sandboxes; a listing of them all fits in a message, and the store keeps some 3 KB for each.
SANDBOXES_PER_TENANT = 5000
# A caller may create all that a tenant may have at once, and then so many a second for as long as it likes: a tenth of what the
# store takes, so that ten who loop do not starve the others.
WRITES_AT_ONCE = 5000.0
WRITES_PER_S = 200.0
# Five seconds of the fastest bursts; an answer that takes longer is better given at once, as a refusal.
SUBMISSIONS_MAX = 10_000
# A decision can be recomputed for an hour: etcd's history is compacted every hour where it is set up as docs/operator.md says.
CYCLES_KEPT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Quotas:
    """Limits with a default that suits a few racks; each may be set."""

    sandboxes_per_tenant: int = SANDBOXES_PER_TENANT
    writes_at_once: float = WRITES_AT_ONCE
    writes_per_s: float = WRITES_PER_S
    submissions_max: int = SUBMISSIONS_MAX
    cycles_kept_s: float = CYCLES_KEPT_S
