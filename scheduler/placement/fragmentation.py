"""What a host's idle devices are worth to the sandboxes that are to come. PURE.

After "Beware of Fragmentation" (Weng et al., USENIX ATC 2023): an idle device counts as fragmented for every shape of request that
cannot use it where it is, by how popular the shape is. Here the complement is kept, the worth: for each shape that the host can
run, its popularity times the idle device parts it could use. Then

    fragmented = popularity of all x idle - worth,    so what a placement fragments is what it takes away from the worth.

The worth is a sum over devices of a function of what is free of each, and of the host's free vCPUs, and over counts of wholly free
devices: two tables, made once for each popularity, and a look-up in place of a walk over all shapes.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.placement.demand import DEVICE_MILLI, Shape, takes_device

# Popularities are in millionths of all.
POPULARITY = 1_000_000
# Levels of free vCPUs that are told apart; more shapes than this many sizes differ too little to matter, and the tables stay small.
LEVELS_MAX = 32
# Shapes are taken up, the most popular first, until they are this much of all, in percent: the tail is chance.
TYPICAL_PERCENT = 95
# As many devices as a host's arrays hold.
COUNTS = 17
FREES = DEVICE_MILLI + 1
STRIDE = FREES + COUNTS


# Until records say otherwise: parts of devices and single ones for inference and small training, whole hosts' for large training.
DEFAULT_POPULARITY = (
    (Shape(4_000, 16_384, 1, 500), 30),
    (Shape(8_000, 32_768, 1), 50),
    (Shape(16_000, 65_536, 2), 8),
    (Shape(32_000, 131_072, 4), 7),
    (Shape(64_000, 262_144, 8), 5),
)


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """What requests tell devices apart by."""

    model: str
    memory_mib: int
    is_shareable: bool


NO_DEVICES = DeviceKind("", -1, False)


class Values:
    """Tables of worth for one popularity of shapes, by kind of device and level of free vCPUs; in `scale` millionths of a device.

    `table` has for each what one device is worth by what is free of it, and then what wholly free ones are worth by their number;
    `flat_free` and `flat_count` are the same in one row, STRIDE apart, so that a look-up is one addition.
    """

    def __init__(
        self,
        popularity: Sequence[tuple[Shape, int]] = (),
        kinds: Sequence[DeviceKind] = (NO_DEVICES,),
        scale: int = 1,
    ) -> None:
        typical = _typical(popularity)
        self.kinds = len(kinds)
        self.levels = _levels(typical)
        self.table = np.zeros((len(kinds), len(self.levels) + 1, STRIDE), np.int64)
        for shape, weight in typical:
            if shape.gpus:
                self._add(shape, weight, kinds)
        self.table *= scale
        self.flat_free = self.table.reshape(-1)
        self.flat_count = self.flat_free[FREES:]
        self._level_list: list[int] = self.levels.tolist()

    def _add(self, shape: Shape, weight: int, kinds: Sequence[DeviceKind]) -> None:
        takes = takes_device(shape)
        level = int(np.searchsorted(self.levels, shape.vcpu_milli, "left")) + 1
        free, count = np.arange(FREES), np.arange(COUNTS)
        for number, kind in enumerate(kinds):
            if kind == NO_DEVICES or not takes(kind.model, kind.memory_mib, kind.is_shareable):
                continue
            if shape.gpu_milli < DEVICE_MILLI:
                usable = np.where(free >= shape.gpu_milli, free * weight // DEVICE_MILLI, 0)
                self.table[number, level:, :FREES] += usable
            else:
                self.table[number, level:, FREES:] += np.where(count >= shape.gpus, count * weight, 0)

    def part_of(self, kind: int) -> int:
        """Where the tables of a kind of devices begin in the flat ones."""
        return kind * (len(self.levels) + 1) * STRIDE

    def of_host(self, kind: int, level: int, free: Sequence[int]) -> int:
        """What the devices of a host of that kind are worth, by the level of its free vCPUs and by what is free of each."""
        if kind >= self.kinds:
            return 0
        table = self.table[kind, level]
        worth = sum(int(table[one]) for one in free if one > 0)
        return worth + int(table[FREES + free.count(DEVICE_MILLI)])

    def level_of(self, vcpu_milli: int) -> int:
        """How many of the levels are free."""
        return bisect_right(self._level_list, vcpu_milli)


def _typical(popularity: Sequence[tuple[Shape, int]]) -> list[tuple[Shape, int]]:
    """The most popular shapes with their shares of all of them, in millionths."""
    ordered = sorted((pair for pair in popularity if pair[1] > 0), key=lambda pair: (-pair[1], _key(pair[0])))
    total, seen, kept = sum(weight for _, weight in ordered), 0, []
    for shape, weight in ordered:
        if seen * 100 >= total * TYPICAL_PERCENT:
            break
        seen += weight
        kept.append((shape, weight))
    return [(shape, weight * POPULARITY // max(1, seen)) for shape, weight in kept]


def _key(shape: Shape) -> tuple[int, int, int, int, tuple[str, ...], int]:
    return shape.vcpu_milli, shape.memory_mib, shape.gpus, shape.gpu_milli, shape.gpu_models, shape.gpu_memory_mib


def _levels(typical: Sequence[tuple[Shape, int]]) -> NDArray[np.int64]:
    """The vCPUs at which one more shape can run; where there are too many, the least popular are left to the next larger."""
    weights: dict[int, int] = {}
    for shape, weight in typical:
        if shape.gpus:
            weights[shape.vcpu_milli] = weights.get(shape.vcpu_milli, 0) + weight
    kept = _most(weights)
    return np.array(sorted(kept), np.int64)


def _most(weights: Mapping[int, int]) -> list[int]:
    ordered = sorted(weights, key=lambda vcpu_milli: (-weights[vcpu_milli], vcpu_milli))[: LEVELS_MAX - 1]
    return sorted({*ordered, max(weights)}) if weights else []
