"""How much each part of a score counts. docs/placement.md explains every one; the scheduler's TOML has them as [weights]. PURE."""

from dataclasses import dataclass

# A score is a sum of at most a dozen terms, each at most 16 devices' millionths times its weight: it stays far below 2^59.
WEIGHT_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Weights:
    """Integer weights of terms in millionths; 0 switches a term off.

    `fragmentation`: what idle devices lose of their worth to requests to come. `vcpu_packing`, `memory_packing`, `disk_packing`:
    the share of the host that stays free. `source_locality`: the sandbox's sources are there. `device_fit`: its devices are behind
    one PCIe switch, or on one NUMA node. `numa_fit`: it fits on one NUMA node. `preferred_labels`: the labels it would rather
    have. `lineage`: near its parent, or away from it. `tenant_spread`: sandboxes of its tenant there. `health`: recent losses.
    """

    fragmentation: int = 100
    vcpu_packing: int = 10
    memory_packing: int = 10
    disk_packing: int = 10
    source_locality: int = 200
    device_fit: int = 50
    numa_fit: int = 20
    preferred_labels: int = 100
    lineage: int = 100
    tenant_spread: int = 2
    health: int = 50
