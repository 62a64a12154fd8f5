"""The filters written down once more, host by host and without arrays: what the placement engine must agree with."""

from dataclasses import dataclass

from fleet.model.host import Capacity, HostRecord, overhead_mib
from fleet.model.ids import NO_DIGEST
from fleet.model.sandbox import SandboxSpec
from scheduler.placement.rows import held_digest


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host with what is left of it."""

    record: HostRecord
    free: Capacity
    is_alive: bool = True
    is_readable: bool = True
    is_cordoned: bool = False


def excluding_codes(spec: SandboxSpec, candidate: Candidate) -> list[str]:
    """The codes of the filters that keep `candidate` from carrying `spec`, in their order; of those that need no GPU."""
    record, free, needed = candidate.record, candidate.free, spec.resources
    passes = {
        "readable": candidate.is_readable,
        "alive": candidate.is_alive,
        "cordoned": not candidate.is_cordoned,
        "labels": set(spec.require_labels) <= set(record.labels),
        "network_mode": spec.network.mode in record.network_modes,
        "image": held_digest(spec.image, record.images) != NO_DIGEST,
        "sandboxes": free.sandboxes >= 1,
        "vcpu": free.vcpus >= needed.vcpus,
        "memory": free.memory_mib >= needed.memory_mib + overhead_mib(needed, record.accelerator),
        "disk": free.disk_mib >= needed.disk_mib,
    }
    return [code for code, passed in passes.items() if not passed]
