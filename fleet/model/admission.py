"""Which specs are refused before anything is placed, field by field: limits, and what no host can enforce yet. PURE.

The rule behind it: every field of a spec is enforced or refused, never ignored. `mb check` shows the same answers offline.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fleet.model.ids import is_digest, is_dns_label
from fleet.model.sandbox import Agent, NetworkMode, Restart, SandboxSpec, Source

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
# Everything the guest is told travels in one header of the guest link (16 KiB, docs/guest-link.md) as JSON. Its numbers, keys and
# digests take under 6 KiB for the most agents and sources; this is what stays for names, commands, environments and paths.
CONFIGURATION_BYTES_MAX = 10 * 1024
TIMEOUT_S_MAX = 30 * 24 * 3600.0
GRACE_PERIOD_S_MAX = 600.0
AGENT_MEMORY_MIB_MIN = 16
PIDS_MIN, PIDS_MAX = 4, 4_194_304
PATH_CHARS_MAX = 1024
# How much of a wrong value a message repeats.
QUOTED_CHARS_MAX = 80

_IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}:[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
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
        *_check_configuration(spec),
        *_check_rest(spec),
    )


def is_label(name: str, value: str) -> bool:
    """Whether this may be a host's label, or one that a sandbox requires; the value may be empty."""
    return _LABEL.fullmatch(name) is not None and (not value or _LABEL.fullmatch(value) is not None)


def _check_names(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    if not is_dns_label(spec.name):
        yield _wrong("name", f"{_quote(spec.name)} is no DNS label", "use 1 to 63 characters of a-z, 0-9 and -")
    if not _IMAGE_NAME.fullmatch(spec.image.name):
        yield _wrong(
            "image.name", f"{_quote(spec.image.name)} is no image name", "write name:tag, for example base:latest"
        )
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
        yield _wrong(
            f"{field}.name", f"{_quote(agent.name)} is no DNS label", "use 1 to 63 characters of a-z, 0-9 and -"
        )
    if agent.harness != "custom":
        message = f"harness {_quote(agent.harness)} is in no image yet"
        yield _unbuilt(f"{field}.harness", message, 'use harness = "custom" with a command')
    elif agent.prompt:
        yield _wrong(f"{field}.prompt", "a custom agent takes its prompt as an argument", "write it into the command")
    if not agent.command or not agent.command[0] or not all(map(_is_text, agent.command)):
        yield _wrong(f"{field}.command", "there is no program to run", "write a list or a shell line")
    yield from _check_agent_limits(field, agent)
    if not agent.workdir.startswith("/") or len(agent.workdir) > PATH_CHARS_MAX or not _is_text(agent.workdir):
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
    strings = [source.guest_path for source in spec.sources]
    for agent in spec.agents:
        strings += [agent.name, agent.workdir, *agent.command]
        strings += [text for variable in agent.env for text in (variable.name, variable.value)]
    # As the link writes them: escaped, in quotes, with a comma and a bracket around each.
    if sum(len(json.dumps(text)) + 2 for text in strings) > CONFIGURATION_BYTES_MAX:
        message = f"names, commands, environments and paths together are past {CONFIGURATION_BYTES_MAX // 1024} KiB"
        yield _wrong("agents", message, "put long texts in a file of the source")


def _check_rest(spec: SandboxSpec) -> Iterator[FieldRefusal]:
    if len(spec.require_labels) > LABELS_MAX:
        yield _wrong("require_labels", f"more than {LABELS_MAX} labels", "require fewer")
    for index, label in enumerate(spec.require_labels[:LABELS_MAX]):
        if not is_label(label.name, label.value):
            message = f"{_quote(label.name)} is no label"
            yield _wrong(f"require_labels[{index}]", message, "use letters, digits and . _ / - inside")
    if spec.secrets:
        yield _unbuilt("secrets", "no host can keep a secret out of reach of the guest yet", "leave them out")


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
