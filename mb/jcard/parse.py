"""Reads a jcard: types, defaults, `${VAR}`, and the names users know. What hosts cannot enforce is left to admission.

Every fault is collected, none stops the reading. Paths expand `~` and `${VAR}` and are relative to the jcard.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from fleet.model.admission import GPU_MILLI_MAX, FieldRefusal
from fleet.model.ids import Digest, is_dns_label
from fleet.model.sandbox import (
    Affinity,
    Forward,
    ImageRef,
    Label,
    Network,
    NetworkMode,
    Placement,
    Resources,
    SandboxSpec,
)
from mb.jcard.agents import Surroundings, agent_tables, read_agents
from mb.jcard.budget import read_account, read_limits
from mb.jcard.model import Jcard, Shared
from mb.jcard.paths import to_path
from mb.jcard.secret import read_secrets
from mb.jcard.table import SYNTAX_INVALID, Reading, Table, shown

NAME_CHARS_MAX = 63

_DEFAULTS = Resources()
_DEFAULT_IMAGE = ImageRef()
_MODES = {mode.value: mode for mode in NetworkMode}
_NAT = "nat"
_NO_MODE = "network.mode is not given: closed, so nothing leaves the sandbox and nothing reaches it"
_NAT_MEANS = (
    "nat would mean here that only what egress_allow lists is reached, and no host can hold a guest to that yet"
)


def parse_jcard(text: str, folder: Path, environment: Mapping[str, str]) -> Jcard:
    """The jcard in `text`, which lies in `folder`; faults and notes are part of the result."""
    return read_jcard(text, folder, Reading(environment))


def read_jcard(text: str, folder: Path, reading: Reading) -> Jcard:
    """The same with a `reading` that the caller keeps, which knows afterwards which fields were asked for."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        values = {}
        reading.faults.append(FieldRefusal("", SYNTAX_INVALID, f"this is not TOML: {error}", "mend the syntax"))
    root = Table(values, "", reading)
    name = _read_name(root, folder)
    image = ImageRef(_read_image(root), Digest(root.text("mixtape_digest")))
    resources = _read_resources(root)
    network = _read_network(root)
    shared = tuple(_read_shared(table, folder) for table in root.tables("shared"))
    secrets = read_secrets(root)
    labels, placement = _read_labels(root, "requires"), _read_placement(root)
    tables = agent_tables(root, is_read=bool(values))
    workdir = shared[0].guest if shared else ""
    about = Surroundings(folder, image.name, network.mode, workdir, resources.memory_mib, tuple(secrets))
    agents = read_agents(tables, about)
    spec = SandboxSpec(
        name,
        image,
        resources,
        network,
        agents=tuple(agent for _, agent in agents),
        require_labels=labels,
        secrets=tuple(secrets),
        placement=placement,
        budget=read_account(root),
        limits=read_limits(root),
    )
    root.finish()
    fields = tuple(field for field, _ in agents)
    return Jcard(spec, shared, fields, secrets, tuple(dict.fromkeys(reading.notes)), tuple(reading.faults))


def to_label(text: str) -> str:
    """The nearest DNS label to `text`, or nothing when it holds no letter or digit."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:NAME_CHARS_MAX].strip("-")


def _read_name(root: Table, folder: Path) -> str:
    name = root.text("name")
    if name and not is_dns_label(name):
        suggestion = to_label(name)
        next_step = f'write name = "{suggestion}"' if suggestion else "use 1 to 63 characters of a-z, 0-9 and -"
        root.fault("name", f"{shown(name)} is no DNS label", next_step)
    if name:
        return name
    label = to_label(folder.name)
    if not label:
        message = f"the folder {shown(folder.name)} makes no name for a sandbox"
        root.fault("name", message, 'write for example name = "fixer"')
    elif label != folder.name:
        root.reading.note(f"name is not given: {label}, after this folder")
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
        gpu_milli=_read_fraction(table),
        gpu_models=table.strings("gpu_models"),
        gpu_memory_mib=table.size_mib("gpu_memory", 0),
    )
    table.finish()
    return resources


def _read_fraction(table: Table) -> int:
    """Thousandths of each device; 0 for all of it."""
    fraction = table.fraction("gpu_fraction", 1.0)
    milli = round(fraction * GPU_MILLI_MAX) if 0 < fraction <= 1 else 0
    if table.has("gpu_fraction") and not 0 < milli <= GPU_MILLI_MAX:
        table.fault("gpu_fraction", f"{shown(fraction)} is no part of a device", "write 0.001 to 1")
    return milli if table.has("gpu_fraction") else 0


def _read_placement(root: Table) -> Placement:
    table = root.table("placement")
    affinities = tuple(str(one) for one in Affinity)
    placement = Placement(
        priority=table.integer("priority", 0),
        tolerations=_read_labels(table, "tolerates"),
        prefer_labels=_read_labels(table, "prefers"),
        parent_affinity=Affinity(table.choice("parent", affinities, Affinity.ANY)),
        group=table.text("group"),
        group_size=table.integer("group_size", 0),
    )
    table.finish()
    return placement


def _read_labels(table: Table, key: str) -> tuple[Label, ...]:
    return tuple(Label(name, value) for name, value in table.variables(key).items())


def _read_network(root: Table) -> Network:
    table = root.table("network")
    mode = table.choice("mode", (*_MODES, _NAT), NetworkMode.CLOSED)
    if mode == _NAT:
        table.fault("mode", _NAT_MEANS, "use closed or none: nothing leaves the sandbox", "not_enforceable")
        mode = NetworkMode.CLOSED
    elif not table.has("mode"):
        root.reading.note(_NO_MODE)
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
    shared = Shared(to_path(host, folder), guest, table.boolean("readonly", False), f"{table.name}.host")
    table.finish()
    return shared
