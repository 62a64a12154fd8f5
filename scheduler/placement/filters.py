"""Which hosts can carry a sandbox, and if none can, why: each host is counted under the first filter that excludes it. PURE.

The order is part of the promise: readable, alive, cordoned, labels, network_mode, image, sandboxes, vcpu, memory, disk. What an
operator must change comes before what only time frees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleet.model.assignment import Refusal, RefusalReason
from fleet.model.host import Capacity, HostRecord, overhead_mib
from fleet.model.ids import NO_DIGEST, Digest, SandboxId
from fleet.model.sandbox import ImageRef, SandboxSpec

NO_HOSTS = RefusalReason("no_hosts", 0, "no host is registered")
# An image that is asked for by its digest alone.
ANY_NAME = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host as a plan sees it: what is left of it moves while the plan is made."""

    record: HostRecord
    free: Capacity
    is_alive: bool = True
    is_readable: bool = True
    is_cordoned: bool = False


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition: a code, whether a host meets it, and the sentence for the hosts that do not."""

    code: str
    passes: Callable[[SandboxSpec, Candidate], bool]
    explain: Callable[[SandboxSpec, Sequence[Candidate]], str]


def first_excluding(spec: SandboxSpec, candidate: Candidate) -> Filter | None:
    """The first filter that keeps `candidate` from carrying `spec`, or None when it can."""
    return next((one for one in FILTERS if not one.passes(spec, candidate)), None)


def refuse(sandbox_id: SandboxId, spec: SandboxSpec, candidates: Sequence[Candidate], now_ms: int) -> Refusal:
    """Why none of `candidates` can carry `spec`, as counts in the order of FILTERS."""
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


def resolve_image(image: ImageRef, record: HostRecord) -> Digest:
    """The digest under which this host holds `image`, NO_DIGEST when it does not; a pinned digest must be the one it holds."""
    held = (one.digest for one in record.images if image.name in (ANY_NAME, one.name))
    return next((digest for digest in held if image.digest in (NO_DIGEST, digest)), NO_DIGEST)


def memory_need_mib(spec: SandboxSpec, record: HostRecord) -> int:
    """Memory that `spec` takes on this host: the guest's and its VMM's."""
    return spec.resources.memory_mib + overhead_mib(spec.resources, record.accelerator)


def _has_labels(spec: SandboxSpec, candidate: Candidate) -> bool:
    return set(spec.require_labels) <= set(candidate.record.labels)


def _explain_labels(spec: SandboxSpec, _excluded: Sequence[Candidate]) -> str:
    wanted = ", ".join(f"{label.name}={label.value}" for label in spec.require_labels)
    return f"the labels {wanted} are not all there"


def _explain_image(spec: SandboxSpec, _excluded: Sequence[Candidate]) -> str:
    named = f" {spec.image.name}" if spec.image.name else ""
    pinned = f" with digest {spec.image.digest}" if spec.image.digest else ""
    return f"image{named}{pinned} is not held"


def _explain_amount(
    unit: str, need: Callable[[SandboxSpec, HostRecord], int], free: Callable[[Capacity], int]
) -> Callable[[SandboxSpec, Sequence[Candidate]], str]:
    def explain(spec: SandboxSpec, excluded: Sequence[Candidate]) -> str:
        # The host that lacks least: its need, which depends on its accelerator, and what is left of it.
        pairs = [(need(spec, one.record), max(0, free(one.free))) for one in excluded]
        needed, left = min(pairs, key=lambda pair: (pair[0] - pair[1], pair))
        return f"needs {needed} {unit}, at most {left} are free"

    return explain


FILTERS = (
    Filter(
        "readable",
        lambda _spec, candidate: candidate.is_readable,
        lambda _spec, _excluded: "carries an order that this scheduler's version cannot read",
    ),
    Filter("alive", lambda _spec, candidate: candidate.is_alive, lambda _spec, _excluded: "not alive"),
    Filter("cordoned", lambda _spec, candidate: not candidate.is_cordoned, lambda _spec, _excluded: "cordoned"),
    Filter("labels", _has_labels, _explain_labels),
    Filter(
        "network_mode",
        lambda spec, candidate: spec.network.mode in candidate.record.network_modes,
        lambda spec, _excluded: f"network mode {spec.network.mode} is not offered",
    ),
    Filter(
        "image",
        lambda spec, candidate: resolve_image(spec.image, candidate.record) != NO_DIGEST,
        _explain_image,
    ),
    Filter(
        "sandboxes",
        lambda _spec, candidate: candidate.free.sandboxes >= 1,
        lambda _spec, _excluded: "carries as many sandboxes as it may",
    ),
    Filter(
        "vcpu",
        lambda spec, candidate: candidate.free.vcpus >= spec.resources.vcpus,
        _explain_amount("vCPUs", lambda spec, _record: spec.resources.vcpus, lambda free: free.vcpus),
    ),
    Filter(
        "memory",
        lambda spec, candidate: candidate.free.memory_mib >= memory_need_mib(spec, candidate.record),
        _explain_amount("MiB of memory", memory_need_mib, lambda free: free.memory_mib),
    ),
    Filter(
        "disk",
        lambda spec, candidate: candidate.free.disk_mib >= spec.resources.disk_mib,
        _explain_amount("MiB of disk", lambda spec, _record: spec.resources.disk_mib, lambda free: free.disk_mib),
    ),
)
