"""What hostd asks of the machine, as Protocols. `tests/contract/drivers/` holds every implementation to this page.

All names are sandbox ids; every `ensure_` and `remove_` is idempotent; each raises HostFaultError naming its step when the
host fails at it, and returns within its driver's own time limit.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fleet.model.host import Accelerator
from fleet.model.ids import SandboxId
from hostd.reconcile.state import DomainState, Machine, ObservedNetwork, Port


@dataclass(frozen=True, slots=True)
class VmUse:
    """What one VM uses of the host: CPU time since its domain began, and the VMM's resident memory with the guest's in it."""

    cpu_ms: int
    memory_mib: int


class Hypervisor(Protocol):
    """Domains of this host. A domain outlives hostd and, at most once, is started by ensure_domain."""

    async def probe_accelerator(self) -> tuple[Accelerator, str]:
        """What a probe guest booted on, with a sentence saying why not on something faster."""

    async def list_domains(self) -> Mapping[SandboxId, DomainState]:
        """Every domain that this driver made and that still exists, dead ones too."""

    async def ensure_domain(self, machine: Machine) -> None:
        """Start the domain, limits in place before its first instruction; let a paused one run on; leave any other as it is."""

    async def pause_domain(self, sandbox_id: SandboxId) -> None:
        """Stop the domain's CPUs where they are; one that does not run, or does not exist, is left as it is."""

    async def remove_domain(self, sandbox_id: SandboxId) -> None:
        """End the domain at once, a paused one too, and forget it; when none exists nothing happens."""

    def set_gate(self, may_run: Callable[[], bool]) -> None:
        """Ask `may_run`, from any thread, right before a domain's first instruction and before one runs on.

        A domain that may not is there, paused; ensure_domain raises nothing and lets it run on another time.
        """

    async def measure(self) -> Mapping[SandboxId, VmUse]:
        """What every VM uses now; one that ends meanwhile is left out."""

    def on_change(self, nudge: Callable[[], None]) -> None:
        """Call `nudge` in the event loop whenever a domain may have changed its state."""

    async def close(self) -> None:
        """Let go of the connection; domains run on."""


class Guard(Protocol):
    """What ends this host's VMs when hostd has not moved their deadline: it outlives hostd, and does not ask it."""

    def arm(self, deadline_ms: int) -> None:
        """Move the deadline, in milliseconds since the machine booted, and see to it that somebody keeps it.

        Raises HostFaultError `guard_unarmed` when it cannot be moved: the old one then stands.
        """

    def disarm(self) -> None:
        """Without a deadline VMs run on; raises HostFaultError `guard_unarmed`."""

    def armed_until_ms(self) -> int | None:
        """The deadline as it was written last in this boot, by whichever hostd; None where there is none to be read."""


class Network(Protocol):
    """The bridge of this host and the sandboxes' taps on it."""

    async def ensure_bridge(self) -> None:
        """The bridge with its address and the default-drop rules, also after someone changed them."""

    async def observe(self) -> ObservedNetwork:
        """Which sandboxes have a tap or rules now."""

    async def ensure_port(self, port: Port) -> None:
        """Rules first, then the tap: at no moment may a frame pass that the rules forbid."""

    async def list_drops(self) -> Mapping[SandboxId, Mapping[str, int]]:
        """By sandbox and cause the frames that its rules have dropped since they were made."""

    async def remove_port(self, sandbox_id: SandboxId) -> Mapping[str, int]:
        """Tap first, then the rules; what these have dropped to the end, by cause."""

    async def remove_bridge(self) -> None:
        """Take the bridge and all rules away; for the end of an embedded host."""


class Disks(Protocol):
    """Scratch disks: the writable part of a sandbox."""

    async def list_scratch(self) -> frozenset[SandboxId]:
        """Sandboxes that have a scratch disk."""

    async def ensure_scratch(self, sandbox_id: SandboxId, size_mib: int) -> str:
        """The absolute path of the sandbox's scratch disk, an empty ext4 when it is made now."""

    async def measure_scratch(self) -> Mapping[SandboxId, int]:
        """How much of the host's disk each scratch disk takes, in MiB, rounded up."""

    async def keep_scratch(self, sandbox_id: SandboxId) -> None:
        """Make durable what a VM that has ended wrote; without a disk nothing happens."""

    async def remove_scratch(self, sandbox_id: SandboxId) -> None:
        """Delete the scratch disk."""


@dataclass(frozen=True, slots=True)
class LinkMessage:
    """One frame of docs/guest-link.md, already within its limits: a type, the header's other fields, the payload."""

    type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    payload: bytes = field(default=b"", repr=False)


# Called for each message in order; the next is read only when this returned. The driver itself adds three types of its own:
# `connected` (a session begins; `hello` follows), `disconnected` (it has ended) and `broken` (the guest broke the protocol too
# often: `message` says how).
LinkReceiver = Callable[[SandboxId, LinkMessage], Awaitable[None]]


class GuestLinks(Protocol):
    """The links to the guests, one for each running sandbox. What the guest sends is bounded but never trusted."""

    def attach(self, sandbox_id: SandboxId, link_path: str, receive: LinkReceiver) -> None:
        """Keep a session up on the socket at `link_path`, until detach; attaching twice changes nothing."""

    async def send(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        """Send one message, its payload as base64; raises UnavailableError `link_down` when no session stands."""

    async def detach(self, sandbox_id: SandboxId) -> None:
        """End the session; nothing is received afterwards."""
