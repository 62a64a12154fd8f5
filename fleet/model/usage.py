"""What running sandboxes use."""

from dataclasses import dataclass

from fleet.model.ids import HostId, SandboxId


@dataclass(frozen=True, slots=True)
class SandboxUsage:
    """One VM's use: CPU time since its domain began, memory and disk on the host, memory as the guest says."""

    sandbox_id: SandboxId
    host_id: HostId
    at_ms: int
    cpu_ms: int = 0
    vmm_memory_mib: int = 0
    guest_memory_mib: int = 0
    disk_mib: int = 0
    heard_at_ms: int = 0
