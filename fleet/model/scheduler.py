"""A scheduler as operators see it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerRecord:
    """What a scheduler says of itself; `leading_since_ms` is the beginning of its last term, 0 before its first."""

    name: str
    address: str
    version: str
    started_at_ms: int
    leading_since_ms: int = 0


@dataclass(frozen=True, slots=True)
class Scheduler:
    """One that serves, and whether it leads now."""

    record: SchedulerRecord
    is_leader: bool
