"""Which specs are refused before anything is placed, field by field: limits, and what no host can enforce yet. PURE.

The rule behind it: every field of a spec is enforced or refused, never ignored. `mb check` shows the same answers offline.
"""

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fleet.model.ids import is_digest, is_dns_label
from fleet.model.sandbox import Agent, NetworkMode, Restart, SandboxSpec, Source

# Bounds of one sandbox. The largest hosts sold today carry about 1,000 threads and 24 TiB; a spec past these is a typing error.
VCPUS_MAX = 1024
MEMORY_MIB_MIN, MEMORY_MIB_MAX = 256, 24 * 1024 * 1024
DISK_MIB_MIN, DISK_MIB_MAX = 64, 64 * 1024 * 1024
# A sandbox is one unit of work: more agents or sources than these belong into several sandboxes.
AGENTS_MAX, SOURCES_MAX, LABELS_MAX = 16, 8, 16
SOURCE_BYTES_MAX = 2 * 1024**3
# Linux takes 128 KiB in one argument; environment and command of one agent stay below half of etcd's request limit.
AGENT_BYTES_MAX = 64 * 1024
TIMEOUT_S_MAX = 30 * 24 * 3600.0
GRACE_PERIOD_S_MAX = 600.0
AGENT_MEMORY_MIB_MIN = 16
PIDS_MIN, PIDS_MAX = 4, 4_194_304
PATH_CHARS_MAX = 1024

_IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}:[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?")
# Where a source would hide what the guest needs to run at all, or is kernel-made.
_RESERVED_PATHS = frozenset(
    [
        "/",
        "/bin",
        "/boot",
        "/dev",
        "/etc",
        "/home",
        "/lib",
        "/lib64",
        "/nix",
        "/opt",
        "/proc",
        "/root",
        "/run",
        "/sbin",
        "/srv",
        "/sys",
        "/tmp",  # noqa: S108 (a path in the guest)
        "/usr",
        "/var",
    ]
)
_RESERVED_TREES = ("/boot/", "/dev/", "/etc/", "/nix/", "/proc/", "/run/", "/sys/", "/usr/", "/var/lib/", "/lib/")


@dataclass(frozen=True, slots=True)
class FieldRefusal:
    """One field that cannot be had as written: which, why, and what to do instead."""

    field: str
    code: str
    message: str
    next_step: str


def refusals(spec: SandboxSpec) -> tuple[FieldRefusal, ...]:
    """Every reason to refuse `spec`, in the order of its fields; none when it is admissible."""
    return (
        *_check_names(spec),
        *_check_resources(spec),
        *_check_network(spec),
        *_check_sources(spec.sources),
        *_check_agents(spec.agents),
        *_check_rest(spec),
    )


def _check_names(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    if not is_dns_label(spec.name):
        yield _wrong("name", f"{spec.name!r} is no DNS label", "use 1 to 63 characters of a-z, 0-9 and -")
    if not _IMAGE_NAME.fullmatch(spec.image.name):
        yield _wrong("image.name", f"{spec.image.name!r} is no image name", "write name:tag, for example base:latest")
    if spec.image.digest and not is_digest(spec.image.digest):
        yield _wrong("image.digest", "it is no digest", "write sha256: and 64 hex digits, or leave it out")


def _check_resources(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    resources = spec.resources
    yield from _check_range("resources.vcpus", resources.vcpus, 1, VCPUS_MAX)
    yield from _check_range("resources.memory_mib", resources.memory_mib, MEMORY_MIB_MIN, MEMORY_MIB_MAX)
    yield from _check_range("resources.disk_mib", resources.disk_mib, DISK_MIB_MIN, DISK_MIB_MAX)
    if resources.gpus:
        yield _unbuilt("resources.gpus", "no host can pass a GPU through yet", "set gpus to 0")


def _check_network(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    network = spec.network
    if network.mode not in (NetworkMode.NONE, NetworkMode.CLOSED):
        message = f"mode {network.mode} is not enforceable on any host"
        yield _unbuilt("network.mode", message, "use closed (a device from which nothing passes) or none")
    if network.egress_allow:
        yield _unbuilt("network.egress_allow", "not enforceable on any host", "leave it empty until egress exists")
    if network.forwards:
        yield _unbuilt("network.forwards", "not enforceable on any host", "leave it empty")


def _check_sources(sources: tuple[Source, ...]) -> Iterator[FieldRefusal]:
    if len(sources) > SOURCES_MAX:
        yield _wrong("sources", f"{len(sources)} sources are more than {SOURCES_MAX}", "put them in one tree")
    for index, source in enumerate(sources[:SOURCES_MAX]):
        field = f"sources[{index}]"
        if not is_digest(source.digest):
            yield _wrong(f"{field}.digest", "it is no digest", "upload the source first; its digest names it")
        yield from _check_range(f"{field}.size_bytes", source.size_bytes, 1, SOURCE_BYTES_MAX)
        yield from _check_guest_path(f"{field}.guest_path", source.guest_path)
    paths = [source.guest_path + "/" for source in sources]
    if any(one != other and one.startswith(other) for one in paths for other in paths) or len(set(paths)) < len(paths):
        yield _wrong(
            "sources", "two guest paths are equal or lie within each other", "give each source a tree of its own"
        )


def _check_guest_path(field: str, path: str) -> Iterator[FieldRefusal]:
    is_clean = path.startswith("/") and not path.startswith("//") and posixpath.normpath(path) == path
    if not is_clean or len(path) > PATH_CHARS_MAX or not path.isprintable():
        yield _wrong(field, f"{path[:80]!r} is no absolute, normalised path", "write for example /workspace")
    elif path in _RESERVED_PATHS or path.startswith(_RESERVED_TREES):
        yield _wrong(field, f"{path} belongs to the system of the guest", "use another path, for example /workspace")


def _check_agents(agents: tuple[Agent, ...]) -> Iterator[FieldRefusal]:
    if not 1 <= len(agents) <= AGENTS_MAX:
        yield _wrong("agents", f"{len(agents)} agents are not 1 to {AGENTS_MAX}", "name at least one agent to run")
    names = [agent.name for agent in agents]
    if len(set(names)) < len(names):
        yield _wrong("agents", "two agents have the same name", "give each a name of its own")
    for index, agent in enumerate(agents[:AGENTS_MAX]):
        yield from _check_agent(f"agents[{index}]", agent)


def _check_agent(field: str, agent: Agent) -> Iterator[FieldRefusal]:
    if not is_dns_label(agent.name):
        yield _wrong(f"{field}.name", f"{agent.name!r} is no DNS label", "use 1 to 63 characters of a-z, 0-9 and -")
    if agent.harness != "custom":
        message = f"harness {agent.harness!r} is in no image yet"
        yield _unbuilt(f"{field}.harness", message, 'use harness = "custom" with a command')
    if not agent.command or not agent.command[0] or any("\0" in argument for argument in agent.command):
        yield _wrong(f"{field}.command", "there is no program to run", "write a list or a shell line")
    yield from _check_agent_limits(field, agent)
    if not agent.workdir.startswith("/") or len(agent.workdir) > PATH_CHARS_MAX or "\0" in agent.workdir:
        yield _wrong(f"{field}.workdir", "it is no absolute path", "write for example /workspace")
    if agent.restart is not Restart.NO or agent.max_restarts:
        yield _unbuilt(f"{field}.restart", "restarts are not built yet", 'use restart = "no"')
    if agent.session:
        yield _unbuilt(
            f"{field}.session", "terminal sessions are not built yet", "leave it out; mb logs shows the output"
        )


def _check_agent_limits(field: str, agent: Agent) -> Iterator[FieldRefusal]:
    yield from _check_range(f"{field}.timeout_s", agent.timeout_s, 0.0, TIMEOUT_S_MAX)
    yield from _check_range(f"{field}.grace_period_s", agent.grace_period_s, 0.0, GRACE_PERIOD_S_MAX)
    yield from _check_range(f"{field}.memory_mib", agent.memory_mib, AGENT_MEMORY_MIB_MIN, MEMORY_MIB_MAX)
    yield from _check_range(f"{field}.pids_max", agent.pids_max, PIDS_MIN, PIDS_MAX)
    for index, variable in enumerate(agent.env):
        if not _ENV_NAME.fullmatch(variable.name) or "\0" in variable.value:
            message = f"{variable.name[:80]!r} is no variable"
            yield _wrong(f"{field}.env[{index}]", message, "use letters, digits and _ in names, no NUL in values")
    strings = [*agent.command, agent.prompt, *(text for var in agent.env for text in (var.name, var.value))]
    if sum(len(text.encode()) for text in strings) > AGENT_BYTES_MAX:
        message = f"command, prompt and env together are past {AGENT_BYTES_MAX // 1024} KiB"
        yield _wrong(field, message, "put long texts in a file of the source")


def _check_rest(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    if len(spec.require_labels) > LABELS_MAX:
        yield _wrong("require_labels", f"more than {LABELS_MAX} labels", "require fewer")
    for index, label in enumerate(spec.require_labels[:LABELS_MAX]):
        if not _LABEL.fullmatch(label.name) or (label.value and not _LABEL.fullmatch(label.value)):
            message = f"{label.name[:80]!r} is no label"
            yield _wrong(f"require_labels[{index}]", message, "use letters, digits and . _ / - inside")
    if spec.secrets:
        yield _unbuilt("secrets", "no host can keep a secret out of reach of the guest yet", "leave them out")


def _check_range(field: str, value: float, low: float, high: float) -> Iterator[FieldRefusal]:
    if not low <= value <= high:
        yield _wrong(field, f"{value} is not between {low} and {high}", "choose a value in that range")


def _wrong(field: str, message: str, next_step: str) -> FieldRefusal:
    return FieldRefusal(field, "field_invalid", message, next_step)


def _unbuilt(field: str, message: str, next_step: str) -> FieldRefusal:
    return FieldRefusal(field, "not_enforceable", message, next_step)
