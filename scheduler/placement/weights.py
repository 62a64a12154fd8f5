"""How much each part of a score counts. docs/placement.md explains every one; the scheduler's TOML has them as [weights]. PURE."""

from dataclasses import dataclass, fields

from fleet.errors import InvalidSpecError

# A score is a sum of at most a dozen terms, each at most 16 devices' millionths times its weight: it stays far below 2^59.
WEIGHT_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Weights:
    """Integer weights of terms in millionths; 0 switches a term off.

    `fragmentation`: what idle devices lose of their worth to requests to come. `balance`: how far apart the free shares of a
    host's vCPUs and devices are, because what is left of one without the other is lost to most requests. `vcpu_packing`,
    `memory_packing`, `disk_packing`: the share of the host that stays free. `source_locality`: the sandbox's sources are there.
    `device_fit`: its devices are behind one PCIe switch, or on one NUMA node. `numa_fit`: it fits on one NUMA node.
    `preferred_labels`: the labels it would rather have. `lineage`: near its parent, or away from it. `tenant_spread`: sandboxes
    of its tenant there. `health`: recent losses of the host.
    """

    fragmentation: int = 100
    balance: int = 40
    vcpu_packing: int = 1
    memory_packing: int = 1
    disk_packing: int = 1
    source_locality: int = 200
    device_fit: int = 20
    numa_fit: int = 2
    preferred_labels: int = 100
    lineage: int = 100
    tenant_spread: int = 1
    health: int = 20

    def __post_init__(self) -> None:
        """Raises InvalidSpecError for a weight that is not from 0 to WEIGHT_MAX."""
        for one in fields(self):
            value = getattr(self, one.name)
            if not 0 <= value <= WEIGHT_MAX:
                message = f"{value} is not from 0 to {WEIGHT_MAX}"
                raise InvalidSpecError(
                    "config_invalid", message, "write a weight in that range", field=f"weights.{one.name}"
                )
