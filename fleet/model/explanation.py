"""Why a sandbox is where it is, or why it waits: what a scheduler's explanation says."""

from dataclasses import dataclass

from fleet.model.assignment import RefusalReason
from fleet.model.ids import HostId, SandboxId


@dataclass(frozen=True, slots=True)
class ScoreTerm:
    """One part of a score, weighted."""

    name: str
    value: int


@dataclass(frozen=True, slots=True)
class RankedHost:
    """A host that can carry the sandbox; the highest score, which is the sum of the terms, is the best."""

    host_id: HostId
    score: int
    terms: tuple[ScoreTerm, ...]


@dataclass(frozen=True, slots=True)
class ExcludedHosts:
    """The hosts that one filter excludes, some by name; `if_passed` of them could carry the sandbox but for it."""

    code: str
    hosts: int
    host_ids: tuple[HostId, ...]
    if_passed: int


@dataclass(frozen=True, slots=True)
class RecordCheck:
    """One thing in which a decision that is made again must be as it was recorded."""

    name: str
    recorded: str
    found: str

    @property
    def is_same(self) -> bool:
        """Whether it is."""
        return self.recorded == self.found


@dataclass(frozen=True, slots=True)
class PlacementExplanation:
    """What is behind a placement or a refusal, as of its decision (`is_then`) or of now; `checks` where it was made again."""

    sandbox_id: SandboxId
    name: str
    host_id: HostId
    cycle: str
    at_ms: int
    is_then: bool
    considered: int
    able: int
    ranking: tuple[RankedHost, ...]
    excluded: tuple[ExcludedHosts, ...]
    reasons: tuple[RefusalReason, ...]
    revision: int = 0
    checks: tuple[RecordCheck, ...] = ()
