"""What sandboxes use, from two looks at their counters, as people read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fleet.model.assignment import Sandbox
from fleet.model.ids import HostId, SandboxId
from fleet.model.units import MIB, render_bytes
from fleet.model.usage import SandboxUsage
from mb.render.text import render_age, render_table


@dataclass(frozen=True, slots=True)
class Use:
    """What one sandbox uses; `cpu_percent` of one core, None where it was seen only once."""

    name: str
    sandbox_id: SandboxId
    host_id: HostId
    cpu_percent: float | None
    guest_memory_mib: int
    vmm_memory_mib: int
    disk_mib: int
    heard_at_ms: int


def measure(
    before: Sequence[SandboxUsage], after: Sequence[SandboxUsage], sandboxes: Mapping[SandboxId, Sandbox]
) -> list[Use]:
    """The use between two looks, the busiest first."""
    earlier = {usage.sandbox_id: usage for usage in before}
    uses = [
        Use(
            sandboxes[usage.sandbox_id].spec.name if usage.sandbox_id in sandboxes else "",
            usage.sandbox_id,
            usage.host_id,
            _cpu_percent(earlier.get(usage.sandbox_id), usage),
            usage.guest_memory_mib,
            usage.vmm_memory_mib,
            usage.disk_mib,
            usage.heard_at_ms,
        )
        for usage in after
    ]
    return sorted(uses, key=lambda use: (-(use.cpu_percent or 0.0), use.sandbox_id))


def render_uses(uses: Sequence[Use], now_ms: int) -> list[str]:
    """A table within 80 columns."""
    if not uses:
        return ["no sandbox runs"]
    rows = [
        (
            use.name or use.sandbox_id,
            use.host_id,
            "-" if use.cpu_percent is None else f"{use.cpu_percent:.0f}",
            render_bytes(use.guest_memory_mib * MIB),
            render_bytes(use.vmm_memory_mib * MIB),
            render_bytes(use.disk_mib * MIB),
            render_age(use.heard_at_ms, now_ms) if use.heard_at_ms else "-",
        )
        for use in uses
    ]
    return render_table(("NAME", "HOST", "CPU %", "GUEST MEM", "VM MEM", "DISK", "HEARD"), rows)


def _cpu_percent(before: SandboxUsage | None, after: SandboxUsage) -> float | None:
    # A VM that was started anew between the looks counts from 0 again.
    if before is None or after.at_ms <= before.at_ms or after.cpu_ms < before.cpu_ms:
        return None
    return round(100 * (after.cpu_ms - before.cpu_ms) / (after.at_ms - before.at_ms), 1)
