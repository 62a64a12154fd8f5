"""One row per request class: every host's score for it, kept up with the hosts that changed since its last use. PURE.

A row is what makes a decision's cost nearly flat in the number of hosts: between two uses of a class only few hosts change, and the
best of a row is found in the best of its blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from fleet.model.host import Accelerator, HostImage
from fleet.model.ids import NO_DIGEST, Digest
from fleet.model.sandbox import ImageRef, Label
from scheduler.placement.columns import (
    ACCELERATOR,
    ACCELERATORS,
    DEVICE_ROWS,
    FREE,
    HAS_DEVICES,
    IDLE,
    MEMORY,
    NODE_MEMORY,
    NODE_MOST,
    NODE_VCPU,
    PART,
    PER_UNIT,
    SHARE_BITS,
    SLOTS,
    SWITCH_MOST,
    VALUE,
    VCPU,
    WHOLE,
    WHOLE_DEVICES,
    Bools,
    Hosts,
    Ints,
)
from scheduler.placement.demand import DEVICE_MILLI, Demand, takes_device
from scheduler.placement.fragmentation import NO_DEVICES, STRIDE, DeviceKind
from scheduler.placement.hosts import OPEN
from scheduler.placement.weights import Weights

# Lower than any score, and still far from where sums overflow: what a host that cannot carry the class has.
NEVER = -(1 << 60)
# Scores below this are NEVER with something added.
NEARLY_NEVER = -(1 << 59)
# Hosts whose best is kept together: of each block with a changed host the best is looked for anew, so blocks are short.
BLOCK = 64
# More losses than these make no host worse: it backs off for an hour by then.
LOSSES_MAX = 8
# An image that is asked for by its digest alone.
ANY_NAME = ""

V = TypeVar("V")
# The places of hosts, or all of them.
Places = Ints | slice


def held_digest(image: ImageRef, images: Iterable[HostImage]) -> Digest:
    """The digest under which a host with `images` holds `image`, NO_DIGEST when it does not."""
    held = (one.digest for one in images if image.name in (ANY_NAME, one.name))
    return next((digest for digest in held if image.digest in (NO_DIGEST, digest)), NO_DIGEST)


class Row:
    """Scores of one class; `seen` and `altered` say how much is in them of the two logs: of changed hosts, of altered ones."""

    def __init__(self, hosts: Hosts, demand: Demand, weights: Weights) -> None:
        self.hosts = hosts
        self.demand = demand
        self.weights = weights
        self.seen = self.altered = 0
        packing = (weights.vcpu_packing, weights.memory_packing, weights.disk_packing, weights.balance)
        self._packing = np.array(packing, np.int64)
        self.need = np.array([self._need_on(one) for one in ACCELERATORS], np.int64).T.copy()
        labels, tolerated = frozenset(demand.labels), frozenset(demand.tolerations)
        # Labels, taints, network modes and images, in the order of `aspects`.
        self.passes: tuple[_Asked, ...] = (
            _Table(hosts.labels.values, lambda held: labels <= held),
            _Table(hosts.taints.values, lambda taints: taints <= tolerated),
            _Table(hosts.networks.values, lambda modes: demand.network_mode in modes),
            _Table(hosts.images.values, lambda images: held_digest(demand.image, images) != NO_DIGEST),
        )
        self._preferred = _Table(hosts.labels.values, self._preference)
        self._device_ok = _Table(hosts.kinds.values, self._takes_kind)
        size = len(hosts)
        self.base = np.empty(size, np.int64)
        self.scores = np.full(-(-size // BLOCK) * BLOCK, NEVER, np.int64)
        self.blocks = self.scores.reshape(-1, BLOCK)
        self.best = np.full(len(self.blocks), NEVER, np.int64)
        self.rebase(slice(0, size))
        self.renew()

    def _need_on(self, accelerator: Accelerator) -> tuple[int, int, int, int, int]:
        demand = self.demand
        devices = demand.gpus * demand.gpu_milli
        return demand.vcpu_milli, demand.memory_on(accelerator), demand.disk_mib, devices, 1

    def _preference(self, held: frozenset[Label]) -> int:
        wanted = frozenset(self.demand.prefer_labels)
        return WHOLE * len(wanted & held) // max(1, len(wanted))

    def _takes_kind(self, kind: DeviceKind) -> bool:
        takes = takes_device(self.demand)
        return kind != NO_DEVICES and takes(kind.model, kind.memory_mib, kind.is_shareable)

    def rebase(self, places: Places) -> None:
        """Looks again at what does not change with the room that is left."""
        hosts = self.hosts
        passes: Bools = np.asarray(hosts.status[places] == OPEN)
        for aspect, numbers in zip(self.passes, hosts.aspects[:, places], strict=True):
            passes &= aspect.look_up(numbers) != 0
        health, preferred = self._lasting(places)
        self.base[places] = np.where(passes, health + preferred, NEVER)

    def _lasting(self, places: Places) -> tuple[Ints, Ints]:
        """The terms that do not change with the room that is left: health, and preferred labels."""
        hosts, weights = self.hosts, self.weights
        health = np.minimum(hosts.losses[places], LOSSES_MAX) * (-weights.health * (WHOLE // LOSSES_MAX))
        if not self.demand.prefer_labels:
            return health, np.zeros_like(health)
        return health, weights.preferred_labels * self._preferred.look_up(hosts.aspects[0, places])

    def renew(self) -> None:
        """Every host's score anew."""
        size = len(self.hosts)
        self.scores[:size] = self.evaluate(slice(0, size))
        self.best[:] = self.blocks.max(axis=1)

    def catch_up(self, places: Ints) -> None:
        """The scores of hosts that changed."""
        self.scores[places] = self.evaluate(places)
        touched = places // BLOCK
        self.best[touched] = np.maximum.reduce(self.blocks.take(touched, axis=0), axis=1)

    def evaluate(self, places: Places, terms: dict[str, Ints] | None = None) -> Ints:
        """The scores of some hosts, NEARLY_NEVER or below for those that cannot; `terms` takes up each part, weighted."""
        hosts, demand = self.hosts, self.demand
        at, base = _gather(hosts.block, places), _gather(self.base, places)
        left = at[FREE] - self.need.take(at[ACCELERATOR], axis=1)
        fits: Bools = np.minimum.reduce(left, axis=0) >= 0
        shares = left[:SLOTS] * at[PER_UNIT]
        shares >>= SHARE_BITS
        shares[IDLE] = np.abs(shares[VCPU] - shares[IDLE]) * at[HAS_DEVICES]
        score: Ints = base - self._packing @ shares
        parts: dict[str, Ints] = {}
        if hosts.devices:
            parts["fragmentation"], can = self._devices(at, left[VCPU])
            fits &= can
        elif demand.gpus:
            fits[:] = False
        if demand.gpus > 1 and not demand.is_fraction:
            parts["device_fit"] = self._device_fit(at)
        if hosts.has_nodes:
            parts["numa_fit"] = self._node_fit(at)
        for part in parts.values():
            score += part
        if terms is not None:
            names = ("vcpu_packing", "memory_packing", "disk_packing", "balance")
            terms["health"], terms["preferred_labels"] = self._lasting(places)
            terms.update(parts, **dict(zip(names, shares * -self._packing[:, None], strict=True)))
        return np.where(fits, score, NEVER)

    def eligible(self, kinds: Ints) -> Bools:
        """Which devices of those kinds can serve the class when free."""
        able: Bools = self._device_ok.look_up(kinds) != 0
        return able

    def _devices(self, at: Ints, vcpu_left: Ints) -> tuple[Ints, Bools | bool]:
        """By how much the worth of each host's devices changes, weighted, and whether they suffice."""
        demand, values = self.demand, self.hosts.values
        free = at[DEVICE_ROWS : self.hosts.device_kinds]
        offsets = values.levels.searchsorted(vcpu_left, "right")
        offsets *= STRIDE
        offsets += at[PART]
        worth = values.flat_free.take(free + offsets)
        after: Ints = np.add.reduce(worth, axis=0)
        after -= at[VALUE]
        counts = offsets + at[WHOLE_DEVICES]
        if not demand.gpus:
            after += values.flat_count.take(counts)
            return after, True
        # Every device that there is can serve it: then what is free of those that are not there excludes them.
        takes_all = self._device_ok.holds_for_all(1)
        if demand.is_fraction:
            able = free >= demand.gpu_milli
            if not takes_all:
                able &= self.eligible(at[self.hosts.device_kinds :])
            after += values.flat_count.take(counts)
            return self._fractions(free, able, worth, (after, offsets, counts))
        if takes_all:
            can: Bools = at[WHOLE_DEVICES] >= demand.gpus
        else:
            able = (free == DEVICE_MILLI) & self.eligible(at[self.hosts.device_kinds :])
            can = np.add.reduce(able, axis=0) >= demand.gpus
        after += values.flat_count.take(np.where(can, counts - demand.gpus, 0))
        after -= demand.gpus * values.flat_free.take(offsets + DEVICE_MILLI)
        return after, can

    def _fractions(self, free: Ints, able: Bools, worth: Ints, at: tuple[Ints, Ints, Ints]) -> tuple[Ints, Bools]:
        """Parts of devices: the one whose use costs the least worth, as many times as devices are asked for."""
        after, offsets, counts = at
        values, demand = self.hosts.values, self.demand
        opening = values.flat_count.take(counts) - values.flat_count.take(np.maximum(counts - 1, 0))
        cost = worth - values.flat_free.take(np.maximum(free - demand.gpu_milli, 0) + offsets)
        cost += (free == DEVICE_MILLI) * opening
        cost = np.where(able, cost, -NEVER)
        if demand.gpus == 1:
            least = np.minimum.reduce(cost, axis=0)
            return after - least, least < -NEVER
        can: Bools = np.add.reduce(able, axis=0) >= demand.gpus
        return after - np.where(can, np.add.reduce(np.sort(cost, axis=0)[: demand.gpus], axis=0), 0), can

    def _device_fit(self, at: Ints) -> Ints:
        """Whether the devices asked for are behind one switch (all), or on one NUMA node (half)."""
        half, gpus = self.weights.device_fit * (WHOLE // 2), self.demand.gpus
        fit: Ints = (at[SWITCH_MOST] >= gpus) * half + (at[NODE_MOST] >= gpus) * half
        return fit

    def _node_fit(self, at: Ints) -> Ints:
        """What is lost where vCPUs or memory do not fit on the NUMA node with the most free vCPUs; nothing on hosts of one node."""
        lacks = (at[NODE_VCPU] < self.demand.vcpu_milli) | (at[NODE_MEMORY] < self.need[MEMORY].take(at[ACCELERATOR]))
        lost: Ints = lacks * np.int64(-self.weights.numa_fit * WHOLE)
        return lost


def _gather(array: Ints, places: Places) -> Ints:
    return array[..., places] if isinstance(places, slice) else array.take(places, axis=-1)


class _Asked(Protocol):
    """What has an answer for each number."""

    def look_up(self, numbers: Ints) -> Ints:
        """The answers for values by their numbers."""
        ...


class _Table(Generic[V]):
    """An answer for each interned value, asked once."""

    def __init__(self, values: Sequence[V], answer: Callable[[V], int]) -> None:
        self._values = values
        self._answer = answer
        self._answers = np.zeros(0, np.int64)
        # Of how many answers, and whether all are yes.
        self._asked_all = (-1, False)

    def look_up(self, numbers: Ints) -> Ints:
        """The answers for values by their numbers."""
        self._ask()
        return self._answers.take(numbers)

    def holds_for_all(self, first: int) -> bool:
        """Whether the answer is yes for every value from that number on."""
        self._ask()
        if self._asked_all[0] != len(self._answers):
            self._asked_all = len(self._answers), bool(self._answers[first:].all())
        return self._asked_all[1]

    def _ask(self) -> None:
        known = len(self._answers)
        if known < len(self._values):
            more = [self._answer(value) for value in self._values[known:]]
            self._answers = np.concatenate([self._answers, np.array(more, np.int64)])
