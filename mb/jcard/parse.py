"""Reads a jcard: types, defaults, `${VAR}`, and the names users know. What hosts cannot enforce is left to admission.

Every fault is collected, none stops the reading. Paths expand `~` and `${VAR}` and are relative to the jcard.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fleet.model.admission import AGENT_MEMORY_MIB_MIN, FieldRefusal
from fleet.model.ids import Digest, is_dns_label
from fleet.model.sandbox import (
    Agent,
    EnvVar,
    Forward,
    ImageRef,
    Label,
    Network,
    NetworkMode,
    Resources,
    Restart,
    SandboxSpec,
)
from mb.jcard.model import Jcard, Shared
from mb.jcard.table import Table

HARNESSES = ("claude-code", "opencode", "gemini-cli", "codex", "custom")
DEFAULT_WORKDIR = "/workspace"
# A jcard is a page, and admission bounds what it becomes. This only stops a wrong file from being read whole.
FILE_BYTES_MAX = 1024 * 1024
NAME_CHARS_MAX = 63
# Where nothing is said and the sandbox has as much.
AGENT_MEMORY_MIB = 2048

_DEFAULTS = Resources()
_DEFAULT_IMAGE = ImageRef()
_MODES = {"none": NetworkMode.NONE, "closed": NetworkMode.CLOSED, "allow": NetworkMode.ALLOW}
_MODES |= {"nat": NetworkMode.ALLOW, "bridged": NetworkMode.BRIDGED}
_NO_MODE = "network.mode is not given: closed, so nothing leaves the sandbox and nothing reaches it"
_NAT = "network.mode nat means allow here: only what egress_allow lists, and nothing when it lists nothing"
_SANDBOXED = "type sandboxed needs nothing more here: every sandbox is a virtual machine"


def parse_jcard(text: str, folder: Path, environment: Mapping[str, str]) -> Jcard:
    """The jcard in `text`, which lies in `folder`; faults and notes are part of the result."""
    faults: list[FieldRefusal] = []
    notes: list[str] = []
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        values = {}
        faults.append(FieldRefusal("", "syntax_invalid", f"this is not TOML: {error}", "mend the syntax"))
    root = Table(values, "", faults, environment)
    name = _read_name(root, folder, notes)
    image = ImageRef(_read_image(root), Digest(root.text("mixtape_digest")))
    resources = _read_resources(root)
    network = _read_network(root, notes)
    shared = tuple(_read_shared(table, folder) for table in root.tables("shared"))
    secrets = root.variables("secrets")
    labels = tuple(Label(name, value) for name, value in root.variables("requires").items())
    tables = _agent_tables(root)
    workdir = shared[0].guest if shared and shared[0].guest else DEFAULT_WORKDIR
    memory_mib = max(min(AGENT_MEMORY_MIB, resources.memory_mib), AGENT_MEMORY_MIB_MIN)
    agents = _name_agents([_read_agent(table, folder, workdir, memory_mib, notes) for table in tables])
    root.finish()
    spec = SandboxSpec(name, image, resources, network, agents=agents, require_labels=labels, secrets=tuple(secrets))
    return Jcard(
        spec, shared, tuple(table.name for table in tables), tuple(dict.fromkeys(notes)), tuple(faults), secrets
    )


def to_label(text: str) -> str:
    """The nearest DNS label to `text`, or nothing when it holds no letter or digit."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:NAME_CHARS_MAX].strip("-")


def _read_name(root: Table, folder: Path, notes: list[str]) -> str:
    name = root.text("name")
    if name and not is_dns_label(name):
        suggestion = to_label(name)
        next_step = f'write name = "{suggestion}"' if suggestion else "use 1 to 63 characters of a-z, 0-9 and -"
        root.fault("name", "it is no DNS label", next_step)
    if name:
        return name
    label = to_label(folder.name)
    if not label:
        root.fault("name", "this folder's name makes no name for a sandbox", 'write name = "…"')
    elif label != folder.name:
        notes.append(f"name is not given: {label}, after this folder")
    return label


def _read_image(root: Table) -> str:
    name = root.text("mixtape", _DEFAULT_IMAGE.name)
    return name if ":" in name else name + ":latest"


def _read_resources(root: Table) -> Resources:
    table = root.table("resources")
    resources = Resources(
        vcpus=table.integer("cpus", _DEFAULTS.vcpus),
        memory_mib=table.size_mib("memory", _DEFAULTS.memory_mib),
        disk_mib=table.size_mib("disk", _DEFAULTS.disk_mib),
        gpus=table.integer("gpus", _DEFAULTS.gpus),
    )
    table.finish()
    return resources


def _read_network(root: Table, notes: list[str]) -> Network:
    table = root.table("network")
    mode = table.choice("mode", tuple(_MODES), "closed")
    if mode == "nat":
        notes.append(_NAT)
    elif not table.has("mode"):
        notes.append(_NO_MODE)
    forwards = tuple(_read_forward(forward) for forward in table.tables("forwards"))
    network = Network(_MODES[mode], table.strings("egress_allow"), forwards)
    table.finish()
    return network


def _read_forward(table: Table) -> Forward:
    protocol = table.choice("proto", ("tcp", "udp"), "tcp")
    forward = Forward(table.integer("host", 0), table.integer("guest", 0), protocol)
    table.finish()
    return forward


def _read_shared(table: Table, folder: Path) -> Shared:
    host, guest = table.expanded("host"), table.text("guest")
    if not host and not table.has("host"):
        table.fault("host", "it is missing", 'name a folder, for example host = "."')
    if not guest and not table.has("guest"):
        table.fault("guest", "it is missing", 'write for example guest = "/workspace"')
    shared = Shared(_path(host, folder), guest, table.boolean("readonly", False), f"{table.name}.host")
    table.finish()
    return shared


def _agent_tables(root: Table) -> list[Table]:
    one, several = root.table("agent"), root.tables("agents")
    if root.has("agent") and root.has("agents"):
        root.fault("agent", "[agent] and [[agents]] are both there", "use one of the two")
    return [one] if root.has("agent") else several


def _read_agent(table: Table, folder: Path, workdir: str, memory_mib: int, notes: list[str]) -> Agent:
    if table.choice("type", ("sandboxed", "native"), "native") == "sandboxed":
        notes.append(_SANDBOXED)
    harness = table.choice("harness", HARNESSES, "claude-code")
    prompt = _read_prompt(table, folder)
    command = _read_command(table, harness, prompt)
    agent = Agent(
        name=table.text("name"),
        harness=harness,
        command=command,
        # A custom agent has its prompt as an argument already.
        prompt="" if harness == "custom" else prompt,
        workdir=table.text("workdir", workdir),
        env=tuple(EnvVar(name, value) for name, value in table.variables("env").items()),
        restart=Restart(table.choice("restart", tuple(Restart), Restart.NO)),
        max_restarts=table.integer("max_restarts", 0),
        timeout_s=table.duration_s("timeout", 0.0),
        grace_period_s=table.duration_s("grace_period", 30.0),
        memory_mib=table.size_mib("memory", memory_mib),
        pids_max=table.integer("pid_limit", 512),
        session=table.text("session"),
    )
    _refuse_unbuilt(table)
    table.finish()
    return agent


def _read_prompt(table: Table, folder: Path) -> str:
    prompt = table.text("prompt")
    file = table.expanded("prompt_file")
    if not file:
        return prompt
    if prompt:
        table.fault("prompt_file", "prompt is there too", "use one of the two")
    path = _path(file, folder)
    try:
        with path.open("rb") as stream:
            content = stream.read(FILE_BYTES_MAX + 1)
        if len(content) <= FILE_BYTES_MAX:
            return content.decode("utf-8")
        table.fault("prompt_file", f"{path} is larger than 1 MiB", "put long texts in a file of the source")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        table.fault("prompt_file", f"{path}: {reason}", "name a readable text file", "file_unreadable")
    return ""


def _read_command(table: Table, harness: str, prompt: str) -> tuple[str, ...]:
    value = _raw_command(table)
    if harness != "custom":
        if value:
            table.fault("command", f"harness {harness} has a command of its own", 'use it with harness = "custom"')
        return (harness,)
    if value and prompt:
        table.fault("prompt", "a command of your own takes no prompt", "write the text into command, or into a file")
    if value or table.has("command"):
        return value
    return ("agent", prompt) if prompt else ("agent",)


def _raw_command(table: Table) -> tuple[str, ...]:
    if not table.is_text("command"):
        return table.strings("command")
    line = table.text("command")
    return ("/bin/sh", "-c", line) if line else ()


def _refuse_unbuilt(table: Table) -> None:
    if table.strings("extra_packages"):
        next_step = "add them to an image recipe and name that image as mixtape"
        table.fault("extra_packages", "nothing is installed when a sandbox starts", next_step, "not_enforceable")
    if table.integer("replicas", 1) != 1:
        next_step = "leave it out, and write an [[agents]] table for each copy"
        table.fault("replicas", "replicas are not built yet", next_step, "not_enforceable")
    if table.boolean("gang", False):
        table.fault("gang", "replicas are not built yet", "leave it out", "not_enforceable")


def _name_agents(agents: list[Agent]) -> tuple[Agent, ...]:
    shares = Counter(agent.harness for agent in agents if not agent.name)
    given: Counter[str] = Counter()
    named: list[Agent] = []
    for agent in agents:
        name = agent.name
        if not name:
            harness = agent.harness
            name = f"{harness}-{given[harness]}" if shares[harness] > 1 else harness
            given[harness] += 1
        named.append(replace(agent, name=name))
    return tuple(named)


def _path(text: str, folder: Path) -> Path:
    try:
        return folder / Path(text).expanduser()
    except RuntimeError:  # no such user's home
        return folder / text
