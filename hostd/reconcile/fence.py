"""When a host whose lease is not renewed stops its VMs. PURE: its times are given, in milliseconds since the machine booted.

    running -- PAUSE_BEFORE_MS before the lease is unsure --> paused -- KILL_AFTER_MS after it --> killed
    paused -- renewed, or a new lease and the orders read since --> running

The scheduler places a lost host's sandboxes anew FENCE_WAIT_S (30 s) after its proof of life is gone, which is never before the
host's own count ends: the kill comes 20 s earlier (docs/decisions/0049).
"""

from collections.abc import Collection
from enum import StrEnum
from typing import Protocol

from fleet.model.ids import SandboxId
from fleet.model.sandbox import Reason

# Pausing a hundred VMs through libvirt takes a second; it is over before the lease may have ended.
PAUSE_BEFORE_MS = 3_000
# A store that is away for a moment, or elects, costs a pause and no VM.
KILL_AFTER_MS = 10_000

HOST_FENCED = Reason(
    "host_fenced",
    "its host could not renew its lease and ended its VM, so that it does not run twice",
    "look at the host's way to the store; submit it again unless its agents restart",
)
HOST_RESTARTED = Reason(
    "host_restarted",
    "its host began anew, and its VM ended with that",
    "submit it again unless its agents restart",
)


class Stance(StrEnum):
    """What VMs that run may do."""

    RUN = "run"
    PAUSE = "pause"
    KILL = "kill"


def find_stance(now_ms: int, sure_until_ms: int) -> Stance:
    """The stance of a host that is sure of its lease until then."""
    if now_ms >= sure_until_ms + KILL_AFTER_MS:
        return Stance.KILL
    return Stance.PAUSE if now_ms >= sure_until_ms - PAUSE_BEFORE_MS else Stance.RUN


class FenceView(Protocol):
    """What the reconciler asks of the fence."""

    def look(self, domains: Collection[SandboxId] | None = None) -> None:
        """Notes what time has done: past the kill, what ran here has failed; and so has, after a boot, what is not in `domains`."""

    def may_begin(self) -> bool:
        """Whether a VM may start or run on now."""


class NoFence:
    """Of a host whose sandboxes are never placed elsewhere: they run whatever becomes of its lease."""

    def look(self, domains: Collection[SandboxId] | None = None) -> None:
        """Nothing happens."""

    def may_begin(self) -> bool:
        """Always."""
        return True
