"""Why no host can carry a request, as counts: each host is counted under the first filter that excludes it. PURE.

The order is part of the promise: readable, alive, cordoned, backing_off, leaving, taints, labels, network_mode, image, sandboxes,
vcpu, memory, disk, gpu_model, gpu. What an operator must change comes before what only time frees. Where no registered host passes
one of those that capacity or configuration decides even when it is empty, alive and open, waiting does not help: the refusal says
that alone, under a code of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fleet.model.assignment import RefusalReason
from fleet.model.host import UNTAGGED
from fleet.model.ids import HostId
from fleet.model.sandbox import Label
from scheduler.placement.columns import DISK, MEMORY, SLOTS, VCPU, Bools, Ints
from scheduler.placement.demand import DEVICE_MILLI, VCPU_MILLI, Wish
from scheduler.placement.hosts import BACKING_OFF, CORDONED, DEAD, UNREADABLE
from scheduler.placement.rows import ANY_NAME, Row

NO_HOSTS = RefusalReason("no_hosts", 0, "no host is registered")
HOST_UNKNOWN = RefusalReason("host_unknown", 0, "the host that has its disk is not registered")
# A message for people: whoever has more images or models than these looks them up.
NAMED_MAX = 8


@dataclass(frozen=True, slots=True)
class Look:
    """The hosts that are considered for a class, and what it asks."""

    row: Row
    wish: Wish
    places: Ints


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition: its code, the hosts that meet it, and the sentence for those that do not.

    `hopeless_code`, `could` (the hosts that meet it when empty) and `despair` are for what no waiting helps.
    """

    code: str
    passes: Callable[[Look], Bools]
    explain: Callable[[Look, Ints], str]
    hopeless_code: str = ""
    could: Callable[[Look], Bools] | None = None
    despair: Callable[[Look], str] | None = None


def refuse(row: Row, wish: Wish) -> tuple[RefusalReason, ...]:
    """The reasons in the order of FILTERS; hosts that no filter excludes are in none."""
    look = look_at(row, wish)
    if not len(look.places):
        return (HOST_UNKNOWN if wish.pinned_host else NO_HOSTS,)
    for one in FILTERS:
        if one.could is not None and one.despair is not None and not one.could(look).any():
            return (RefusalReason(one.hopeless_code, len(look.places), one.despair(look)),)
    first = first_excluding(look)
    reasons = []
    for number, one in enumerate(FILTERS):
        excluded = np.flatnonzero(first == number)
        if len(excluded):
            reasons.append(RefusalReason(one.code, len(excluded), one.explain(look, look.places[excluded])))
    return tuple(reasons)


def crowded(row: Row, wish: Wish) -> tuple[HostId, ...]:
    """The hosts which only what is on them excludes."""
    look = look_at(row, wish)
    if not len(look.places):
        return ()
    first = first_excluding(look)
    able = (first >= next(number for number, one in enumerate(FILTERS) if one.code == "sandboxes")) & (
        first < len(FILTERS)
    )
    for one in FILTERS:
        if one.could is not None:
            able &= one.could(look)
    views = row.hosts.views
    return tuple(views[place].record.host_id for place in look.places[able].tolist())


def look_at(row: Row, wish: Wish) -> Look:
    """The hosts that count for a sandbox."""
    pinned = row.hosts.index.get(wish.pinned_host)
    places = [pinned] if pinned is not None else range(0 if wish.pinned_host else len(row.hosts))
    return Look(row, wish, np.array(places, np.int64))


def first_excluding(look: Look) -> Ints:
    """The number of the first filter that excludes each host, len(FILTERS) for a host that can carry the class."""
    first = np.full(len(look.places), len(FILTERS), np.int64)
    for number in reversed(range(len(FILTERS))):
        first[~FILTERS[number].passes(look)] = number
    return first


def _status(code: str, status: int, sentence: str) -> Filter:
    def passes(look: Look) -> Bools:
        passed: Bools = look.row.hosts.status[look.places] != status
        return passed

    return Filter(code, passes, lambda _look, _excluded: sentence)


def _leaving(look: Look) -> Bools:
    index = look.row.hosts.index
    avoided = [index[host_id] for host_id in look.wish.avoid_hosts if host_id in index]
    passed: Bools = ~np.isin(look.places, np.array(avoided, np.int64))
    return passed


def _aspect(number: int) -> Callable[[Look], Bools]:
    def passes(look: Look) -> Bools:
        passed: Bools = look.row.passes[number].look_up(look.row.hosts.aspects[number, look.places]) != 0
        return passed

    return passes


def _amount(code: str, unit: str, dimension: int) -> Filter:
    def needs(look: Look) -> Ints:
        need: Ints = look.row.need[dimension, look.row.hosts.accelerator[look.places]]
        return need

    def passes(look: Look) -> Bools:
        passed: Bools = look.row.hosts.free[dimension, look.places] >= needs(look)
        return passed

    def could(look: Look) -> Bools:
        passed: Bools = look.row.hosts.capacity[dimension, look.places] >= needs(look)
        return passed

    def pair(look: Look, excluded: Ints, amounts: Ints) -> tuple[str, str]:
        # The host that lacks least: its need, which depends on its accelerator, and what is left of it.
        need = look.row.need[dimension, look.row.hosts.accelerator[excluded]]
        left = np.maximum(amounts[dimension, excluded], 0)
        needed, free = min(zip(need.tolist(), left.tolist(), strict=True), key=lambda one: (one[0] - one[1], one))
        return _said(dimension, needed), _said(dimension, free)

    def explain(look: Look, excluded: Ints) -> str:
        needed, left = pair(look, excluded, look.row.hosts.free)
        return f"needs {needed} {unit}, at most {left} are free"

    def despair(look: Look) -> str:
        needed, left = pair(look, look.places, look.row.hosts.capacity)
        return f"needs {needed} {unit}, no host has more than {left}"

    return Filter(code, passes, explain, f"{code}_too_large", could, despair)


def _said(dimension: int, amount: int) -> str:
    if dimension != VCPU:
        return str(amount)
    whole, rest = divmod(amount, VCPU_MILLI)
    return f"{whole}.{rest:03}".rstrip("0") if rest else str(whole)


def _devices(look: Look, *, is_empty: bool) -> Ints:
    """How many devices of each host can serve the class, now or when nothing is given away."""
    able = look.row.eligible(look.row.hosts.device_kind[:, look.places])
    if not is_empty:
        able = able & (look.row.hosts.device_free[:, look.places] >= look.row.demand.gpu_milli)
    counted: Ints = able.sum(axis=0)
    return counted


def _has_models(look: Look) -> Bools:
    passed: Bools = _devices(look, is_empty=True) >= look.row.demand.gpus
    return passed


def _has_devices(look: Look) -> Bools:
    passed: Bools = _devices(look, is_empty=False) >= look.row.demand.gpus
    return passed


def _wanted_devices(look: Look) -> str:
    demand = look.row.demand
    models = " or ".join(demand.gpu_models) + " " if demand.gpu_models else ""
    part = f", {demand.gpu_milli} thousandths of each" if demand.gpu_milli < DEVICE_MILLI else ""
    memory = f" with {demand.gpu_memory_mib} MiB or more" if demand.gpu_memory_mib else ""
    return f"{demand.gpus} {models}{'GPU' if demand.gpus == 1 else 'GPUs'}{memory}{part}"


def _explain_devices(look: Look, excluded: Ints) -> str:
    most = int(_devices(Look(look.row, look.wish, excluded), is_empty=False).max())
    return f"needs {_wanted_devices(look)}, at most {most} are free"


def _despair_models(look: Look) -> str:
    models = sorted({gpu.model for view in look.row.hosts.views for gpu in view.record.gpus})
    more = ", …" if len(models) > NAMED_MAX else ""
    return f"no host has {_wanted_devices(look)}; known models: {', '.join(models[:NAMED_MAX]) or 'none'}{more}"


def _sentence(labels: tuple[Label, ...]) -> str:
    return ", ".join(f"{label.name}={label.value}" for label in labels)


def _explain_taints(look: Look, excluded: Ints) -> str:
    tolerated = set(look.row.demand.tolerations)
    views = (look.row.hosts.views[place] for place in excluded.tolist())
    found = sorted({f"{one.name}={one.value}" for view in views for one in view.record.taints if one not in tolerated})
    more = ", …" if len(found) > NAMED_MAX else ""
    return f"kept for what tolerates {', '.join(found[:NAMED_MAX])}{more}"


def _explain_labels(look: Look, _excluded: Ints) -> str:
    return f"the labels {_sentence(look.row.demand.labels)} are not all there"


def _explain_mode(look: Look, _excluded: Ints) -> str:
    return f"network mode {look.row.demand.network_mode} is not offered"


def _wanted_image(look: Look) -> str:
    image = look.row.demand.image
    named = f" {image.name}" if image.name else ""
    return f"image{named}{f' with digest {image.digest}' if image.digest else ''}"


def _despair_image(look: Look) -> str:
    if look.row.demand.image.name == ANY_NAME:
        return f"its host does not hold {_wanted_image(look)} any more, on which its disk lies"
    views = (look.row.hosts.views[place] for place in look.places.tolist())
    known = sorted({image.name for view in views for image in view.record.images} - {UNTAGGED})
    more = ", …" if len(known) > NAMED_MAX else ""
    return f"no host has {_wanted_image(look)}; known: {', '.join(known[:NAMED_MAX]) or 'none'}{more}"


def _has_slot(look: Look) -> Bools:
    passed: Bools = look.row.hosts.free[SLOTS, look.places] >= 1
    return passed


FILTERS = (
    _status("readable", UNREADABLE, "carries an order that this scheduler's version cannot read"),
    _status("alive", DEAD, "not alive"),
    _status("cordoned", CORDONED, "an operator lets nothing new onto it"),
    _status("backing_off", BACKING_OFF, "was lost of late, and waits before it takes anything new"),
    Filter("leaving", _leaving, lambda _look, _excluded: "an earlier placement of it is still being removed there"),
    Filter("taints", _aspect(1), _explain_taints),
    Filter(
        "labels",
        _aspect(0),
        _explain_labels,
        "labels_unknown",
        _aspect(0),
        lambda look: f"no host has the labels {_sentence(look.row.demand.labels)}",
    ),
    Filter(
        "network_mode",
        _aspect(2),
        _explain_mode,
        "network_mode_unknown",
        _aspect(2),
        lambda look: f"no host offers network mode {look.row.demand.network_mode}",
    ),
    Filter(
        "image",
        _aspect(3),
        lambda look, _excluded: f"{_wanted_image(look)} is not held",
        "image_unknown",
        _aspect(3),
        _despair_image,
    ),
    Filter("sandboxes", _has_slot, lambda _look, _excluded: "carries as many sandboxes as it may"),
    _amount("vcpu", "vCPUs", VCPU),
    _amount("memory", "MiB of memory", MEMORY),
    _amount("disk", "MiB of disk", DISK),
    Filter(
        "gpu_model",
        _has_models,
        lambda look, _excluded: f"has not {_wanted_devices(look)}",
        "gpu_unknown",
        _has_models,
        _despair_models,
    ),
    Filter("gpu", _has_devices, _explain_devices),
)
