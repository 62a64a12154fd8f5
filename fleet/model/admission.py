"""Which specs are refused before anything is placed, field by field: limits, and what no host can enforce yet. PURE.

The rule behind it: every field of a spec is enforced or refused, never ignored. `mb check` shows the same answers offline.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fleet.model.ids import is_digest, is_dns_label, is_sandbox_id
from fleet.model.policy import policy_faults
from fleet.model.sandbox import Affinity, Agent, Label, NetworkMode, Restart, SandboxSpec, Source

# Bounds of one sandbox. A q35 machine numbers its CPUs with APIC ids of 8 bits, for want of an emulated IOMMU. The largest hosts
# sold today carry 24 TiB; a spec past that is a typing error.
VCPUS_MAX = 255
MEMORY_MIB_MIN, MEMORY_MIB_MAX = 256, 24 * 1024 * 1024
DISK_MIB_MIN, DISK_MIB_MAX = 64, 64 * 1024 * 1024
# A sandbox is one unit of work: more agents or sources than these belong into several sandboxes.
AGENTS_MAX, SOURCES_MAX, LABELS_MAX = 16, 8, 16
# More variables than any shell exports; a spec of a million empty ones must not cost a million refusals.
ENV_MAX = 256
SOURCE_BYTES_MAX = 2 * 1024**3
# A chassis takes ten devices at most today. Thousandths of one device are the finest part that vGPU profiles come in.
GPUS_MAX, GPU_MILLI_MAX = 16, 1000
# Wide enough for every order that people keep in mind, and a bound for what a mistake can push aside.
PRIORITY_MIN, PRIORITY_MAX = -1000, 1000
# A group is placed in one transaction of 120 conditions at most, and each member takes up to seven.
GROUP_SIZE_MIN, GROUP_SIZE_MAX = 2, 16
# Everything the guest is told travels in one header of the guest link (16 KiB, docs/guest-link.md) as JSON. Its numbers, keys and
# digests take under 6 KiB for the most agents and sources; this is what stays for names, commands, environments and paths.
CONFIGURATION_BYTES_MAX = 10 * 1024
# A command holds the prompt as an argument, so a longer one could never be ordered.
PROMPT_BYTES_MAX = CONFIGURATION_BYTES_MAX
# A start a minute for as long as the longest timeout is 43,200; past this a number is a typing error.
RESTARTS_MAX = 100_000
# Each is a file of the guest's memory and a frame of the guest link: credentials of a unit of work, not a store of them.
SECRETS_MAX = 32
# What mb reads, a frame of the guest link carries (256 KiB), and the scheduler and a host hold in memory on the way.
SECRET_BYTES_MAX, SECRETS_BYTES_MAX = 64 * 1024, 256 * 1024
# What turns a prompt into an agent's command is mb's; a spec keeps the name. `custom` has a command of its own.
CUSTOM = "custom"
HARNESSES = ("claude-code", "opencode", "gemini-cli", "codex", CUSTOM)
TIMEOUT_S_MAX = 30 * 24 * 3600.0
GRACE_PERIOD_S_MAX = 600.0
AGENT_MEMORY_MIB_MIN = 16
PIDS_MIN, PIDS_MAX = 4, 4_194_304
PATH_CHARS_MAX = 1024
# What a sandbox, or an account, may be limited to: a hundred years of a large fleet, in milliseconds. Past it a number is a
# typing error, and sums stay far from 64 bits.
LIMIT_MAX = 2**53
# How much of a wrong value a message repeats.
QUOTED_CHARS_MAX = 80

_IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}:[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
# A file's name in the guest and the stem of a variable (NAME_FILE).
_SECRET_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
# tmux turns . and : into _, and takes a leading - for an option.
_SESSION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?")
# NUL ends a string in the kernel; lone surrogates stand for variables and file names that are no UTF-8, and protobuf takes none.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
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
_RESERVED_TREES = (
    *("/bin/", "/boot/", "/dev/", "/etc/", "/lib/", "/lib64/", "/nix/", "/proc/", "/run/", "/sbin/", "/sys/", "/usr/"),
    "/var/lib/",
)


_UNBUILT_MODES = {
    NetworkMode.ALLOW: "no host can let only listed destinations through yet",
    NetworkMode.BRIDGED: "bridged needs a host whose policy offers its network to guests, and no host has such a policy",
}


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
        *_check_placement(spec),
        *_check_network(spec),
        *_check_sources(spec.sources),
        *_check_agents(spec),
        *_check_configuration(spec),
        *_check_rest(spec),
        *_check_budget(spec),
    )


def is_label(name: str, value: str) -> bool:
    """Whether this may be a host's label, or one that a sandbox requires; the value may be empty."""
    return _LABEL.fullmatch(name) is not None and (not value or _LABEL.fullmatch(value) is not None)


def is_secret_name(text: str) -> bool:
    """Whether `text` may name a secret: 1 to 64 of A-Z, 0-9 and _, no digit first."""
    return _SECRET_NAME.fullmatch(text) is not None


def _check_names(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    if not is_dns_label(spec.name):
        yield _wrong("name", f"{_quote(spec.name)} is no DNS label", "use 1 to 63 characters of a-z, 0-9 and -")
    if not _IMAGE_NAME.fullmatch(spec.image.name):
        yield _wrong(
            "image.name", f"{_quote(spec.image.name)} is no image name", "write name:tag, for example base:latest"
        )
    if spec.image.digest and not is_digest(spec.image.digest):
        yield _wrong(
            "image.digest",
            f"{_quote(spec.image.digest)} is no digest",
            "write sha256: and 64 hex digits, or leave it out",
        )


def _check_resources(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    resources = spec.resources
    yield from _check_range("resources.vcpus", resources.vcpus, 1, VCPUS_MAX)
    yield from _check_range("resources.memory_mib", resources.memory_mib, MEMORY_MIB_MIN, MEMORY_MIB_MAX)
    yield from _check_range("resources.disk_mib", resources.disk_mib, DISK_MIB_MIN, DISK_MIB_MAX)
    yield from _check_range("resources.gpus", resources.gpus, 0, GPUS_MAX)
    if not resources.gpus:
        for field in ("gpu_milli", "gpu_models", "gpu_memory_mib"):
            if getattr(resources, field):
                yield _wrong(f"resources.{field}", "it says which GPUs, and gpus is 0", "ask for GPUs, or leave it out")
        return
    yield from _check_range("resources.gpu_milli", resources.gpu_milli, 0, GPU_MILLI_MAX)
    yield from _check_range("resources.gpu_memory_mib", resources.gpu_memory_mib, 0, MEMORY_MIB_MAX)
    if len(resources.gpu_models) > LABELS_MAX:
        message = f"{len(resources.gpu_models)} models are more than {LABELS_MAX}"
        yield _wrong("resources.gpu_models", message, "name fewer, or none for any")
    for index, model in enumerate(resources.gpu_models[:LABELS_MAX]):
        if not is_label(model, ""):
            message = f"{_quote(model)} is no name of a model"
            yield _wrong(f"resources.gpu_models[{index}]", message, "use letters, digits and . _ / - inside")


def _check_placement(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    placement = spec.placement
    yield from _check_range("placement.priority", placement.priority, PRIORITY_MIN, PRIORITY_MAX)
    yield from _check_labels("placement.tolerations", placement.tolerations)
    yield from _check_labels("placement.prefer_labels", placement.prefer_labels)
    if placement.parent_affinity is not Affinity.ANY and not spec.parent:
        message = f"{placement.parent_affinity}, and no sandbox has started this one"
        yield _wrong("placement.parent_affinity", message, "leave it out: it is for what a sandbox starts")
    if not placement.group:
        if placement.group_size:
            message = f"{placement.group_size}, and no group is named"
            yield _wrong("placement.group_size", message, "name the group, or leave it out")
        return
    if not is_dns_label(placement.group):
        message = f"{_quote(placement.group)} is no DNS label"
        yield _wrong("placement.group", message, "use 1 to 63 characters of a-z, 0-9 and -")
    yield from _check_range("placement.group_size", placement.group_size, GROUP_SIZE_MIN, GROUP_SIZE_MAX)


def _check_labels(field: str, labels: tuple[Label, ...]) -> Iterator[FieldRefusal]:
    if len(labels) > LABELS_MAX:
        yield _wrong(field, f"{len(labels)} labels are more than {LABELS_MAX}", "name fewer")
    for index, label in enumerate(labels[:LABELS_MAX]):
        if not is_label(label.name, label.value):
            message = f"{_quote(label.name)} is no label"
            yield _wrong(f"{field}[{index}]", message, "use letters, digits and . _ / - inside")


def _check_network(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    network = spec.network
    for field, fault in policy_faults(network, spec.routes):
        yield _wrong(field, fault.message, fault.next_step)
    if network.mode in _UNBUILT_MODES:
        next_step = "use closed (a device from which nothing passes) or none"
        yield _unbuilt("network.mode", _UNBUILT_MODES[network.mode], next_step)
    if network.egress_allow:
        message = "no host can hold a guest to a list of destinations yet"
        yield _unbuilt("network.egress_allow", message, "leave it empty: nothing leaves the sandbox")
    if network.forwards:
        message = "no host can lead one of its ports into a guest yet"
        yield _unbuilt("network.forwards", message, "leave it empty: nothing reaches the sandbox")
    for field in ("rules", "bandwidth_mbit", "connections_max", "egress_bytes_max"):
        if getattr(network, field):
            yield _unbuilt(
                f"network.{field}", "no host can hold a guest to it yet", "leave it out: nothing leaves the sandbox"
            )
    if spec.routes:
        yield _unbuilt("routes", "no host can put a secret in on the way yet", "leave it empty")


def _check_sources(sources: tuple[Source, ...]) -> Iterator[FieldRefusal]:
    if len(sources) > SOURCES_MAX:
        yield _wrong("sources", f"{len(sources)} sources are more than {SOURCES_MAX}", "put them in one tree")
    for index, source in enumerate(sources[:SOURCES_MAX]):
        field = f"sources[{index}]"
        if not is_digest(source.digest):
            yield _wrong(f"{field}.digest", "it is no digest", "upload the source first; its digest names it")
        yield from _check_range(f"{field}.size_bytes", source.size_bytes, 1, SOURCE_BYTES_MAX)
        yield from _check_guest_path(f"{field}.guest_path", source.guest_path)
    paths = [source.guest_path + "/" for source in sources[:SOURCES_MAX]]
    if any(one != other and one.startswith(other) for one in paths for other in paths) or len(set(paths)) < len(paths):
        yield _wrong(
            "sources", "two guest paths are equal or lie within each other", "give each source a tree of its own"
        )


def _check_guest_path(field: str, path: str) -> Iterator[FieldRefusal]:
    is_clean = path.startswith("/") and not path.startswith("//") and posixpath.normpath(path) == path
    if not is_clean or len(path) > PATH_CHARS_MAX or not path.isprintable():
        yield _wrong(field, f"{_quote(path)} is no absolute, normalised path", "write for example /workspace")
    elif path in _RESERVED_PATHS or path.startswith(_RESERVED_TREES):
        yield _wrong(field, f"{path} belongs to the system of the guest", "use another path, for example /workspace")


def _check_agents(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    agents = spec.agents
    if not agents:
        yield _wrong("agents", "there is no agent to run", "name at least one, in a table [agent]")
    if len(agents) > AGENTS_MAX:
        yield _wrong("agents", f"{len(agents)} agents are more than {AGENTS_MAX}", "share them out over sandboxes")
    names = [agent.name for agent in agents]
    if len(set(names)) < len(names):
        yield _wrong("agents", "two agents have the same name", "give each a name of its own")
    sessions = [agent.session for agent in agents if agent.session]
    if len(set(sessions)) < len(sessions):
        yield _wrong("agents", "two agents have the same session", "give each a session of its own")
    for index, agent in enumerate(agents[:AGENTS_MAX]):
        field = f"agents[{index}]"
        yield from _check_agent(field, agent)
        yield from _check_lives(field, agent)
        yield from _check_agent_limits(field, agent)
        yield from _check_share(field, agent, spec)


def _check_agent(field: str, agent: Agent) -> Iterator[FieldRefusal]:
    if not is_dns_label(agent.name):
        yield _wrong(
            f"{field}.name", f"{_quote(agent.name)} is no DNS label", "use 1 to 63 characters of a-z, 0-9 and -"
        )
    if agent.harness not in HARNESSES:
        message = f"harness {_quote(agent.harness)} is not known"
        yield _wrong(f"{field}.harness", message, f"use one of {', '.join(HARNESSES)}")
    if agent.prompt and agent.harness == CUSTOM:
        yield _wrong(f"{field}.prompt", "a custom agent takes its prompt as an argument", "write it into the command")
    elif not _is_text(agent.prompt):
        yield _wrong(f"{field}.prompt", "it holds a NUL or no UTF-8", "write text")
    elif len(agent.prompt.encode()) > PROMPT_BYTES_MAX:
        message = f"it is longer than {PROMPT_BYTES_MAX // 1024} KiB"
        yield _wrong(f"{field}.prompt", message, "put long texts in a file of the source")
    if not agent.command or not agent.command[0] or not all(map(_is_text, agent.command)):
        yield _wrong(f"{field}.command", "there is no program to run", "write a list or a shell line")
    if not agent.workdir.startswith("/") or len(agent.workdir) > PATH_CHARS_MAX or not _is_text(agent.workdir):
        yield _wrong(f"{field}.workdir", f"{_quote(agent.workdir)} is no absolute path", "write for example /workspace")


def _check_lives(field: str, agent: Agent) -> Iterator[FieldRefusal]:
    """Restarts and the session."""
    yield from _check_range(f"{field}.max_restarts", agent.max_restarts, 0, RESTARTS_MAX)
    if agent.restart is Restart.NO and 0 < agent.max_restarts <= RESTARTS_MAX:
        next_step = 'write restart = "on-failure" or "always" with it, or leave it out'
        message = f"{agent.max_restarts}, and nothing restarts this agent"
        yield _wrong(f"{field}.max_restarts", message, next_step)
    if agent.session and not _SESSION.fullmatch(agent.session):
        message = f"{_quote(agent.session)} is no name of a session"
        yield _wrong(f"{field}.session", message, "use 1 to 63 letters, digits, _ and -, no - first")


def _check_share(field: str, agent: Agent, spec: SandboxSpec) -> Iterator[FieldRefusal]:
    """What an agent has of its sandbox: memory and secrets."""
    room = spec.resources.memory_mib
    if MEMORY_MIB_MIN <= room < agent.memory_mib <= MEMORY_MIB_MAX:
        message = f"{agent.memory_mib} is more than the sandbox's {room}"
        yield _wrong(f"{field}.memory_mib", message, "give the agent less or the sandbox more")
    taken = {f"{name}_FILE" for name in spec.secrets[:SECRETS_MAX]}
    for index, variable in enumerate(agent.env[:ENV_MAX]):
        if variable.name in taken:
            message = f"{_quote(variable.name)} says where a secret lies"
            yield _wrong(f"{field}.env[{index}]", message, "rename the variable or the secret")


def _check_agent_limits(field: str, agent: Agent) -> Iterator[FieldRefusal]:
    yield from _check_range(f"{field}.timeout_s", agent.timeout_s, 0.0, TIMEOUT_S_MAX)
    yield from _check_range(f"{field}.grace_period_s", agent.grace_period_s, 0.0, GRACE_PERIOD_S_MAX)
    yield from _check_range(f"{field}.memory_mib", agent.memory_mib, AGENT_MEMORY_MIB_MIN, MEMORY_MIB_MAX)
    yield from _check_range(f"{field}.pids_max", agent.pids_max, PIDS_MIN, PIDS_MAX)
    if len(agent.env) > ENV_MAX:
        yield _wrong(f"{field}.env", f"{len(agent.env)} variables are more than {ENV_MAX}", "put them in a file")
    for index, variable in enumerate(agent.env[:ENV_MAX]):
        if not _ENV_NAME.fullmatch(variable.name) or not _is_text(variable.value):
            message = f"{_quote(variable.name)} is no variable"
            yield _wrong(f"{field}.env[{index}]", message, "use letters, digits and _ in names, no NUL in values")
    names = [variable.name for variable in agent.env]
    if len(set(names)) < len(names):
        yield _wrong(f"{field}.env", "a variable is named twice", "name each once")


def _check_configuration(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    strings = [*spec.secrets, *(source.guest_path for source in spec.sources)]
    for agent in spec.agents:
        strings += [agent.name, agent.workdir, agent.session, *agent.command]
        strings += [text for variable in agent.env for text in (variable.name, variable.value)]
    # As the link writes them: escaped, in quotes, with a comma and a bracket around each.
    if sum(len(json.dumps(text)) + 2 for text in strings) > CONFIGURATION_BYTES_MAX:
        message = f"names, commands, environments and paths together are past {CONFIGURATION_BYTES_MAX // 1024} KiB"
        yield _wrong("agents", message, "put long texts in a file of the source")


def _check_rest(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    yield from _check_labels("require_labels", spec.require_labels)
    if len(spec.secrets) > SECRETS_MAX:
        yield _wrong("secrets", f"{len(spec.secrets)} secrets are more than {SECRETS_MAX}", "keep fewer")
    for index, name in enumerate(spec.secrets[:SECRETS_MAX]):
        if not is_secret_name(name):
            message = f"{_quote(name)} is no name of a secret"
            yield _wrong(f"secrets[{index}]", message, "use 1 to 64 of A-Z, 0-9 and _, no digit first")
    if len(set(spec.secrets)) < len(spec.secrets):
        yield _wrong("secrets", "a secret is named twice", "name each once")


def _check_budget(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    if spec.budget and not is_dns_label(spec.budget):
        message = f"{_quote(spec.budget)} is no account's name"
        yield _wrong("budget", message, "use 1 to 63 characters of a-z, 0-9 and -, as in mb budget ls")
    if spec.parent and not is_sandbox_id(spec.parent):
        yield _wrong("parent", f"{_quote(spec.parent)} is no sandbox's id", "mb ls --json shows ids")
    if spec.parent and spec.budget:
        yield _wrong("budget", "a sandbox with a parent pays from its parent's account", "leave it out")
    for part, values in (("concurrent", spec.limits.concurrent), ("total", spec.limits.total)):
        for name in values.__slots__:
            yield from _check_range(f"limits.{part}.{name}", getattr(values, name), 0, LIMIT_MAX)


def _check_range(field: str, value: float, low: float, high: float) -> Iterator[FieldRefusal]:
    if not low <= value <= high:
        yield _wrong(field, f"{value} is not between {low} and {high}", "choose a value in that range")


def _is_text(text: str) -> bool:
    return _NO_TEXT.search(text) is None


def _quote(text: str) -> str:
    return repr(text[:QUOTED_CHARS_MAX])


def _wrong(field: str, message: str, next_step: str) -> FieldRefusal:
    return FieldRefusal(field, "field_invalid", message, next_step)


def _unbuilt(field: str, message: str, next_step: str) -> FieldRefusal:
    return FieldRefusal(field, "not_enforceable", message, next_step)
