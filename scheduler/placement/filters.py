"""Which hosts can carry a sandbox, and if none can, why: each host is counted under the first filter that excludes it. PURE.

The order is part of the promise: readable, alive, cordoned, backing_off, leaving, labels, network_mode, image, sandboxes, vcpu,
memory, disk. What an operator must change comes before what only time frees. Where no registered host passes one of labels,
network_mode, image, vcpu, memory or disk even when it is empty, alive and open, waiting does not help: the refusal says that alone,
under a code of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleet.model.assignment import Refusal, RefusalReason
from fleet.model.host import UNTAGGED, Capacity, HostRecord, overhead_mib
from fleet.model.ids import NO_DIGEST, Digest, SandboxId
from fleet.model.sandbox import ImageRef, SandboxSpec

NO_HOSTS = RefusalReason("no_hosts", 0, "no host is registered")
# An image that is asked for by its digest alone.
ANY_NAME = ""
# A message for people: whoever has more images than these looks them up.
IMAGES_NAMED_MAX = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host as a plan sees it: what is left of it moves while the plan is made."""

    record: HostRecord
    free: Capacity
    is_alive: bool = True
    is_readable: bool = True
    is_cordoned: bool = False
    is_backing_off: bool = False
    is_leaving: bool = False


Explain = Callable[[SandboxSpec, Sequence[Candidate]], str]


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition: a code, whether a host meets it, and the sentence for the hosts that do not.

    `hopeless_code` and `despair` are for a fleet in which no host can meet it, whatever else leaves.
    """

    code: str
    passes: Callable[[SandboxSpec, Candidate], bool]
    explain: Explain
    hopeless_code: str = ""
    despair: Explain | None = None


def first_excluding(spec: SandboxSpec, candidate: Candidate) -> Filter | None:
    """The first filter that keeps `candidate` from carrying `spec`, or None when it can."""
    return next((one for one in FILTERS if not one.passes(spec, candidate)), None)


def refuse(sandbox_id: SandboxId, spec: SandboxSpec, candidates: Sequence[Candidate], now_ms: int) -> Refusal:
    """Why none of `candidates` can carry `spec`, as counts in the order of FILTERS; one reason for all where it is hopeless."""
    hopeless = _hopeless(spec, candidates)
    if hopeless is not None:
        return Refusal(sandbox_id, len(candidates), (hopeless,), now_ms)
    excluded: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        filter_ = first_excluding(spec, candidate)
        if filter_ is not None:
            excluded.setdefault(filter_.code, []).append(candidate)
    reasons = tuple(
        RefusalReason(one.code, len(excluded[one.code]), one.explain(spec, excluded[one.code]))
        for one in FILTERS
        if one.code in excluded
    )
    return Refusal(sandbox_id, len(candidates), reasons or (NO_HOSTS,), now_ms)


def _hopeless(spec: SandboxSpec, candidates: Sequence[Candidate]) -> RefusalReason | None:
    empty = [Candidate(one.record, one.record.capacity) for one in candidates]
    for one in FILTERS:
        if one.despair is not None and empty and not any(one.passes(spec, candidate) for candidate in empty):
            return RefusalReason(one.hopeless_code, len(empty), one.despair(spec, empty))
    return None


def resolve_image(image: ImageRef, record: HostRecord) -> Digest:
    """The digest under which this host holds `image`, NO_DIGEST when it does not; a pinned digest must be the one it holds."""
    held = (one.digest for one in record.images if image.name in (ANY_NAME, one.name))
    return next((digest for digest in held if image.digest in (NO_DIGEST, digest)), NO_DIGEST)


def memory_need_mib(spec: SandboxSpec, record: HostRecord) -> int:
    """Memory that `spec` takes on this host: the guest's and its VMM's."""
    return spec.resources.memory_mib + overhead_mib(spec.resources, record.accelerator)


def _has_labels(spec: SandboxSpec, candidate: Candidate) -> bool:
    return set(spec.require_labels) <= set(candidate.record.labels)


def _wanted_labels(spec: SandboxSpec) -> str:
    return ", ".join(f"{label.name}={label.value}" for label in spec.require_labels)


def _explain_labels(spec: SandboxSpec, _excluded: Sequence[Candidate]) -> str:
    return f"the labels {_wanted_labels(spec)} are not all there"


def _explain_image(spec: SandboxSpec, _excluded: Sequence[Candidate]) -> str:
    return f"{_wanted_image(spec)} is not held"


def _despair_image(spec: SandboxSpec, empty: Sequence[Candidate]) -> str:
    if spec.image.name == ANY_NAME:
        return f"its host does not hold {_wanted_image(spec)} any more, on which its disk lies"
    known = sorted({image.name for one in empty for image in one.record.images} - {UNTAGGED})
    more = ", …" if len(known) > IMAGES_NAMED_MAX else ""
    return f"no host has {_wanted_image(spec)}; known: {', '.join(known[:IMAGES_NAMED_MAX]) or 'none'}{more}"


def _wanted_image(spec: SandboxSpec) -> str:
    named = f" {spec.image.name}" if spec.image.name else ""
    pinned = f" with digest {spec.image.digest}" if spec.image.digest else ""
    return f"image{named}{pinned}"


Amount = Callable[[SandboxSpec, HostRecord], int]


def _explain_amount(unit: str, need: Amount, free: Callable[[Capacity], int], sentence: str) -> Explain:
    def explain(spec: SandboxSpec, excluded: Sequence[Candidate]) -> str:
        # The host that lacks least: its need, which depends on its accelerator, and what is left of it.
        pairs = [(need(spec, one.record), max(0, free(one.free))) for one in excluded]
        needed, left = min(pairs, key=lambda pair: (pair[0] - pair[1], pair))
        return sentence.format(needed=needed, left=left, unit=unit)

    return explain


def _amount(code: str, unit: str, need: Amount, free: Callable[[Capacity], int]) -> Filter:
    return Filter(
        code,
        lambda spec, candidate: free(candidate.free) >= need(spec, candidate.record),
        _explain_amount(unit, need, free, "needs {needed} {unit}, at most {left} are free"),
        f"{code}_too_large",
        _explain_amount(unit, need, free, "needs {needed} {unit}, no host has more than {left}"),
    )


FILTERS = (
    Filter(
        "readable",
        lambda _spec, candidate: candidate.is_readable,
        lambda _spec, _excluded: "carries an order that this scheduler's version cannot read",
    ),
    Filter("alive", lambda _spec, candidate: candidate.is_alive, lambda _spec, _excluded: "not alive"),
    Filter(
        "cordoned",
        lambda _spec, candidate: not candidate.is_cordoned,
        lambda _spec, _excluded: "an operator lets nothing new onto it",
    ),
    Filter(
        "backing_off",
        lambda _spec, candidate: not candidate.is_backing_off,
        lambda _spec, _excluded: "was lost of late, and has to stay a while first",
    ),
    Filter(
        "leaving",
        lambda _spec, candidate: not candidate.is_leaving,
        lambda _spec, _excluded: "still has something of the sandbox's earlier placement",
    ),
    Filter(
        "labels",
        _has_labels,
        _explain_labels,
        "labels_unknown",
        lambda spec, _empty: f"no host has the labels {_wanted_labels(spec)}",
    ),
    Filter(
        "network_mode",
        lambda spec, candidate: spec.network.mode in candidate.record.network_modes,
        lambda spec, _excluded: f"network mode {spec.network.mode} is not offered",
        "network_mode_unknown",
        lambda spec, _empty: f"no host offers network mode {spec.network.mode}",
    ),
    Filter(
        "image",
        lambda spec, candidate: resolve_image(spec.image, candidate.record) != NO_DIGEST,
        _explain_image,
        "image_unknown",
        _despair_image,
    ),
    Filter(
        "sandboxes",
        lambda _spec, candidate: candidate.free.sandboxes >= 1,
        lambda _spec, _excluded: "carries as many sandboxes as it may",
    ),
    _amount("vcpu", "vCPUs", lambda spec, _record: spec.resources.vcpus, lambda free: free.vcpus),
    _amount("memory", "MiB of memory", memory_need_mib, lambda free: free.memory_mib),
    _amount("disk", "MiB of disk", lambda spec, _record: spec.resources.disk_mib, lambda free: free.disk_mib),
)
