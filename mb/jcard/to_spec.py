"""Completes a jcard's spec with its packed sources and lets admission judge it, with answers in the jcard's own field names."""

import re
from collections.abc import Sequence
from dataclasses import replace

from fleet.model.admission import FieldRefusal, refusals
from fleet.model.ids import Digest
from fleet.model.sandbox import SandboxSpec, Source
from mb.jcard.model import Jcard
from mb.jcard.table import SHOWN_CHARS_MAX, SYNTAX_INVALID
from mb.limits import CONCURRENT, DIMENSIONS
from mb.pack import Packed

# Stands for a source that could not be packed, so that the rest can be judged; such a spec is never sent.
UNPACKED = Packed(Digest("sha256:" + "0" * 64), 1, 0)

_FIELDS = {
    "image.name": "mixtape",
    "image.digest": "mixtape_digest",
    "resources.vcpus": "resources.cpus",
    "resources.memory_mib": "resources.memory",
    "resources.disk_mib": "resources.disk",
    "resources.gpu_milli": "resources.gpu_fraction",
    "resources.gpu_memory_mib": "resources.gpu_memory",
    "budget": "budget.account",
    **{
        f"limits.{'concurrent' if one.field in CONCURRENT else 'total'}.{one.field}": f"limits.{one.word}"
        for one in DIMENSIONS
    },
    "placement.tolerations": "placement.tolerates",
    "placement.prefer_labels": "placement.prefers",
    "placement.parent_affinity": "placement.parent",
    "sources": "[[shared]]",
    "require_labels": "requires",
}
_AGENT_FIELDS = {
    "timeout_s": "timeout",
    "grace_period_s": "grace_period",
    "memory_mib": "memory",
    "pids_max": "pid_limit",
}
_OWN_KEYS = ("require_labels", "secrets", "placement.tolerations", "placement.prefer_labels")
_INDEXED = re.compile(
    r"(agents|sources|require_labels|secrets|placement\.tolerations|placement\.prefer_labels)\[(\d+)\]\.?(.*)"
)
_ENV = re.compile(r"env\[(\d+)\]")


def to_spec(jcard: Jcard, packed: Sequence[Packed]) -> SandboxSpec:
    """The spec of `jcard`, whose shared folders became `packed`."""
    sources = tuple(
        Source(pack.digest, pack.size_bytes, shared.guest, shared.readonly)
        for shared, pack in zip(jcard.shared, packed, strict=True)
    )
    return replace(jcard.spec, sources=sources)


def find_faults(jcard: Jcard, spec: SandboxSpec) -> tuple[FieldRefusal, ...]:
    """Everything that stands against `spec`: what reading found, then what admission refuses where reading found nothing."""
    if any(fault.code == SYNTAX_INVALID for fault in jcard.faults):
        return jcard.faults
    known = {fault.field for fault in jcard.faults}
    # Replicas have the same faults.
    refused = dict.fromkeys(_in_jcard_words(jcard, refusal) for refusal in refusals(spec))
    return (*jcard.faults, *(refusal for refusal in refused if refusal.field not in known))


def to_jcard_field(jcard: Jcard, field: str) -> str:
    """The jcard's name of a field of the spec: `agents[0].timeout_s` is `agent.timeout`."""
    match = _INDEXED.fullmatch(field)
    if match is None:
        return _FIELDS.get(
            field, "[[agents]]" if field == "agents" and len(jcard.agent_fields) > 1 else _singular(field)
        )
    kind, index, rest = match.group(1), int(match.group(2)), match.group(3)
    if kind in _OWN_KEYS:
        return f"{_FIELDS.get(kind, kind)}.{_own_key(jcard.spec, kind, index)}"
    if kind == "sources":
        return f"[[shared]][{index}]" + (".guest" if rest == "guest_path" else ".host")
    table = jcard.agent_fields[index]
    return f"{table}.{_agent_field(jcard, index, rest)}" if rest else table


def _own_key(spec: SandboxSpec, kind: str, index: int) -> str:
    """The key that the user chose."""
    if kind == "secrets":
        return spec.secrets[index][:SHOWN_CHARS_MAX]
    placement = spec.placement
    labels = {"require_labels": spec.require_labels, "placement.tolerations": placement.tolerations}
    return labels.get(kind, placement.prefer_labels)[index].name


def _in_jcard_words(jcard: Jcard, refusal: FieldRefusal) -> FieldRefusal:
    # Users write sizes with a unit; a spec counts MiB.
    unit = ", in MiB" if refusal.field.endswith("_mib") else ""
    return replace(refusal, field=to_jcard_field(jcard, refusal.field), message=refusal.message + unit)


def _agent_field(jcard: Jcard, index: int, field: str) -> str:
    match = _ENV.fullmatch(field)
    if match is not None:
        return "env." + jcard.spec.agents[index].env[int(match.group(1))].name[:80]
    return _AGENT_FIELDS.get(field, field)


def _singular(field: str) -> str:
    return "agent" if field == "agents" else field
