"""Which of the hosts that can carry a sandbox is the best. PURE and total: two hosts never score the same."""

from fleet.model.ids import HostId
from fleet.model.sandbox import SandboxSpec
from scheduler.placement.filters import Candidate, memory_need_mib

# Shares of a host are compared as integers in millionths: the same on every machine, unlike floats' sums.
WHOLE = 1_000_000

Score = tuple[bool, int, HostId]


def score(spec: SandboxSpec, candidate: Candidate, *, has_sources: bool) -> Score:
    """The lowest is the best: a host that holds every source, then the one that the sandbox fills best, then the host's id."""
    return not has_sources, _left_over(spec, candidate), candidate.record.host_id


def _left_over(spec: SandboxSpec, candidate: Candidate) -> int:
    """What would be left of the host, as the sum of its shares of vCPUs, memory and disk."""
    free, capacity = candidate.free, candidate.record.capacity
    left = (
        (free.vcpus - spec.resources.vcpus, capacity.vcpus),
        (free.memory_mib - memory_need_mib(spec, candidate.record), capacity.memory_mib),
        (free.disk_mib - spec.resources.disk_mib, capacity.disk_mib),
    )
    return sum(amount * WHOLE // max(1, whole) for amount, whole in left)
