"""What a step of the leader's cycle is: it decides on a snapshot, and hears what became of its decisions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fleet.errors import BedplateError
from fleet.model.ids import SandboxId
from fleet.store.port import Committed
from scheduler.commit import Change
from scheduler.placement.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the store: a snapshot to be read without awaiting, and the sandboxes about which something has changed.

    `cycle_lease` is what the record of a cycle is put under.
    """

    snapshot: Snapshot
    touched: frozenset[SandboxId]
    now_ms: int
    cycle_lease: int = 0


class Step:
    """A part of a cycle: `due` is asked in each pass, and the rest told about what it gave, the last as often as `due` gave any."""

    name = ""

    def due(self, look: Look) -> Sequence[Change]:
        """What to write, decided on the snapshot; empty when nothing is due."""
        raise NotImplementedError

    def told(self, changes: Sequence[Change], outcome: Committed) -> None:
        """What became of a group of its changes."""

    def failed(self, error: BedplateError) -> None:
        """The store failed: whether what was not told of was written is not known."""

    def done(self) -> None:
        """All is told; what was not told of was not tried."""

    def rest_s(self) -> float:
        """For how long nothing is due of itself, by what it saw last; infinity where only a change makes something due."""
        return math.inf
