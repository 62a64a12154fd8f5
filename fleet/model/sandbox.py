"""A sandbox: its spec (what was asked) and its status (what its host publishes).

PENDING -> ASSIGNED -> STARTING -> RUNNING -> COMPLETED | FAILED | STOPPED
any of these -> REMOVING -> REMOVED; LOST when its host's lease is gone
"""

from dataclasses import dataclass
from enum import StrEnum

from fleet.model.ids import NO_DIGEST, NO_SANDBOX, Digest, HostId, SandboxId, Tenant


class Goal(StrEnum):
    """What the owner wants of a sandbox."""

    RUN = "run"
    STOP = "stop"
    REMOVE = "remove"


class Phase(StrEnum):
    """Where a sandbox is in its life."""

    PENDING = "pending"
    ASSIGNED = "assigned"
    STARTING = "starting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"
    REMOVING = "removing"
    REMOVED = "removed"


ENDED_PHASES = frozenset({Phase.COMPLETED, Phase.FAILED, Phase.STOPPED, Phase.REMOVED})


class NetworkMode(StrEnum):
    """What a sandbox's network reaches: `none` has no device, `closed` has one from which nothing passes."""

    NONE = "none"
    CLOSED = "closed"
    ALLOW = "allow"
    BRIDGED = "bridged"


class Restart(StrEnum):
    """When an agent that ended is started again."""

    NO = "no"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


class AgentPhase(StrEnum):
    """Where one agent is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMED_OUT = "timed-out"
    RESTARTING = "restarting"


ENDED_AGENT_PHASES = frozenset({AgentPhase.COMPLETED, AgentPhase.FAILED, AgentPhase.TIMED_OUT})


@dataclass(frozen=True, slots=True)
class Resources:
    """What a sandbox may use; memory is the guest's own, without the VMM's overhead."""

    vcpus: int = 2
    memory_mib: int = 4096
    disk_mib: int = 20480
    gpus: int = 0
    gpu_milli: int = 0
    gpu_models: tuple[str, ...] = ()
    gpu_memory_mib: int = 0


@dataclass(frozen=True, slots=True)
class Forward:
    """One port of the host that leads to one of the guest."""

    host_port: int
    guest_port: int
    protocol: str = "tcp"


@dataclass(frozen=True, slots=True)
class HttpRule:
    """What may be asked of one allowed host; of several rules for a host one must fit. None of a list: any.

    A path is exact, or a prefix that ends with `*`. The host's TLS ends at the gateway: else nobody could see what is asked.
    """

    host: str
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """The network a sandbox asks for; its limits are none at 0. fleet.model.egress reads `egress_allow`."""

    mode: NetworkMode = NetworkMode.CLOSED
    egress_allow: tuple[str, ...] = ()
    forwards: tuple[Forward, ...] = ()
    rules: tuple[HttpRule, ...] = ()
    bandwidth_mbit: int = 0
    connections_max: int = 0
    egress_bytes_max: int = 0


@dataclass(frozen=True, slots=True)
class CredentialRoute:
    """A secret that the gateway puts in on the way to `hosts` ("name" or "name:port"): the guest has a placeholder for it.

    The placeholder is in the guest's variable `name`, begins with `prefix`, and is replaced in these headers and query
    parameters of requests to these paths (as HttpRule's; none: any), and nowhere else. `secret` is the tenant's, in the store.
    """

    name: str
    secret: str
    hosts: tuple[str, ...]
    paths: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    query: tuple[str, ...] = ()
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image by name with tag ("base:latest"), by digest (empty: not pinned), or by both."""

    name: str = "base:latest"
    digest: Digest = NO_DIGEST


@dataclass(frozen=True, slots=True)
class Source:
    """A read-only tree that goes into a sandbox; `digest` and `size_bytes` are of its canonical tar."""

    digest: Digest
    size_bytes: int
    guest_path: str
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class EnvVar:
    """One environment variable of an agent."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Label:
    """A name with a value, on a host or required of one."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Agent:
    """One program that a sandbox runs; `timeout_s` and `max_restarts` are unlimited at 0; `session` names a tmux session."""

    name: str
    harness: str
    command: tuple[str, ...]
    prompt: str = ""
    workdir: str = "/workspace"
    env: tuple[EnvVar, ...] = ()
    restart: Restart = Restart.NO
    max_restarts: int = 0
    timeout_s: float = 0.0
    grace_period_s: float = 30.0
    memory_mib: int = 2048
    pids_max: int = 512
    session: str = ""


class Affinity(StrEnum):
    """What a parent's host is to its child: where it would rather be, or rather not."""

    ANY = "any"
    NEAR = "near"
    AWAY = "away"


@dataclass(frozen=True, slots=True)
class Placement:
    """How a sandbox wants to be placed; of one `group` all `group_size` members are placed at once, or none."""

    priority: int = 0
    tolerations: tuple[Label, ...] = ()
    prefer_labels: tuple[Label, ...] = ()
    parent_affinity: Affinity = Affinity.ANY
    group: str = ""
    group_size: int = 0


@dataclass(frozen=True, slots=True)
class Amounts:
    """What is set aside at one moment; as a limit, 0 means none. `depth` counts generations of sandboxes below."""

    vcpus: int = 0
    memory_mib: int = 0
    disk_mib: int = 0
    gpu_milli: int = 0
    sandboxes: int = 0
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Totals:
    """What is used over time; as a limit, 0 means none. `cost_micro` is in millionths of the price table's unit."""

    wall_ms: int = 0
    vcpu_ms: int = 0
    gpu_ms: int = 0
    egress_bytes: int = 0
    cost_micro: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What an account or a sandbox, with all below it, may use: at once, and in total."""

    concurrent: Amounts = Amounts()
    total: Totals = Totals()


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What was asked for, complete: nothing in it is ever ignored, only enforced or refused."""

    name: str
    image: ImageRef = ImageRef()
    resources: Resources = Resources()
    network: Network = Network()
    sources: tuple[Source, ...] = ()
    agents: tuple[Agent, ...] = ()
    require_labels: tuple[Label, ...] = ()
    secrets: tuple[str, ...] = ()
    placement: Placement = Placement()
    parent: SandboxId = NO_SANDBOX
    budget: str = ""
    limits: Limits = Limits()
    routes: tuple[CredentialRoute, ...] = ()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is as it is: a machine-readable code, a sentence, and what to do next."""

    code: str
    message: str
    next_step: str = ""


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    """The owner's wish, as stored; `generation` rises with every change of the goal, `run` with every start after a stop.

    `placement` rises when it shall go to another host; `reason` says why the scheduler, and not the owner, changed the goal;
    `ancestors` has the parent first.
    """

    sandbox_id: SandboxId
    tenant: Tenant
    spec: SandboxSpec
    goal: Goal
    generation: int
    created_at_ms: int
    run: int = 1
    placement: int = 1
    reason: Reason | None = None
    ancestors: tuple[SandboxId, ...] = ()
    not_before_ms: int = 0


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """One agent as the guest link reports it."""

    name: str
    phase: AgentPhase = AgentPhase.WAITING
    exit_code: int | None = None
    signal: int | None = None
    output_bytes: int = 0
    output_truncated: bool = False
    started_at_ms: int = 0
    ended_at_ms: int = 0
    reason: Reason | None = None
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """A named moment of a sandbox's life; hosts use StageName's."""

    name: str
    at_ms: int


class StageName(StrEnum):
    """The moments that a host notes of each run, in their usual order."""

    IMAGE_VERIFIED = "image_verified"
    DISKS_READY = "disks_ready"
    NETWORK_READY = "network_ready"
    DOMAIN_STARTED = "domain_started"
    # The next three as the guest says: it may lie about them, and harms nobody.
    KERNEL_STARTED = "kernel_started"
    INIT_STARTED = "init_started"
    ROOT_MOUNTED = "root_mounted"
    LINK_CONNECTED = "link_connected"
    CONFIGURED = "configured"
    AGENTS_STARTED = "agents_started"
    FIRST_OUTPUT = "first_output"
    AGENTS_ENDED = "agents_ended"
    ARTIFACT_STORED = "artifact_stored"
    DISK_KEPT = "disk_kept"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Artifact:
    """What came out of a sandbox: a tar of the changes against its sources, and how many paths changed."""

    digest: Digest
    size_bytes: int
    changes: int


@dataclass(frozen=True, slots=True)
class SandboxStatus:
    """What the host of a sandbox publishes; `released` says that its vCPUs and memory are free again."""

    sandbox_id: SandboxId
    host_id: HostId
    generation: int
    phase: Phase
    reason: Reason | None = None
    agents: tuple[AgentStatus, ...] = ()
    stages: tuple[Stage, ...] = ()
    artifact: Artifact | None = None
    accelerator: str = ""
    address: str = ""
    released: bool = False
    at_ms: int = 0
    run: int = 1
    placement: int = 1
