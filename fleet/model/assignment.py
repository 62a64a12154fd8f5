"""What the scheduler decided: an assignment to one host, or a refusal with its counts."""

from dataclasses import dataclass

from fleet.model.ids import NO_DIGEST, NO_HOST, Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Goal, Phase, Reason, SandboxSpec, SandboxStatus


@dataclass(frozen=True, slots=True)
class GpuShare:
    """A part of one of a host's devices, in thousandths."""

    device_id: str
    milli: int


ANY_NODE = -1


@dataclass(frozen=True, slots=True)
class Assignment:
    """The order to one host to carry one sandbox; complete, so that a host needs nothing else to obey it.

    `placement` counts the sandbox's placements; this one began with `first_run` and has no disk of an earlier run. `reason` says
    why the scheduler, and not the owner, ends it; `cycle` names the record of the decision. It counts in the budgets of `accounts`,
    the nearest first; in the tenant's own where none are named.
    """

    sandbox_id: SandboxId
    tenant: Tenant
    host_id: HostId
    spec: SandboxSpec
    image_digest: Digest
    overhead_mib: int
    goal: Goal
    generation: int
    created_at_ms: int
    assigned_at_ms: int
    run: int = 1
    placement: int = 1
    first_run: int = 1
    gpus: tuple[GpuShare, ...] = ()
    reason: Reason | None = None
    cycle: str = ""
    numa_node: int = ANY_NODE
    accounts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RefusalReason:
    """One filter's part in a refusal: how many hosts it excluded."""

    code: str
    hosts: int
    message: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no host took a sandbox in the last plan; it stays pending and is tried again. `cycle` names the decision's record.

    `host_id` is the host on which room is being made for it.
    """

    sandbox_id: SandboxId
    hosts_considered: int
    reasons: tuple[RefusalReason, ...]
    at_ms: int
    cycle: str = ""
    host_id: HostId = NO_HOST


@dataclass(frozen=True, slots=True)
class Sandbox:
    """All that a client may know of one sandbox, joined from record, assignment, refusal and status.

    `reason` says why the scheduler moved it to another host, or ended it.
    """

    sandbox_id: SandboxId
    tenant: Tenant
    spec: SandboxSpec
    goal: Goal
    generation: int
    created_at_ms: int
    phase: Phase
    host_id: HostId = NO_HOST
    image_digest: Digest = NO_DIGEST
    refusal: Refusal | None = None
    status: SandboxStatus | None = None
    assigned_at_ms: int = 0
    run: int = 1
    placement: int = 1
    reason: Reason | None = None
