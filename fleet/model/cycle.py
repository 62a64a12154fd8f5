"""What a scheduler's cycle saw and decided, kept so that it can be decided again and compared."""

from dataclasses import dataclass

from fleet.model.assignment import GpuShare
from fleet.model.ids import HostId, SandboxId


@dataclass(frozen=True, slots=True)
class Decision:
    """One sandbox's placement, or with NO_HOST its refusal."""

    sandbox_id: SandboxId
    host_id: HostId
    placement: int
    gpus: tuple[GpuShare, ...] = ()
    score: int = 0
    refusal_codes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CycleRecord:
    """One cycle: the store's `revision` that it looked at with the digest of all of that, and what it decided.

    `submitted` are the sandboxes whose own records were written together with the decisions; unless the cycle `is_full`, these
    alone were looked at.
    """

    cycle: str
    leader: str
    term_revision: int
    revision: int
    now_ms: int
    seed: int
    version: str
    settings_digest: str
    input_digest: str
    submitted: tuple[SandboxId, ...]
    decisions: tuple[Decision, ...]
    decisions_digest: str
    is_full: bool = True
