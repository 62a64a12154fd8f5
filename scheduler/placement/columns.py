"""The hosts of a cluster as arrays, one per dimension, in the order of their ids. PURE.

Whatever scores look at lies in one block, one row per dimension: what they need of some hosts is one gathering. Whoever changes
a host's room goes through `shift`, which also keeps what follows from it: wholly free devices, the most of them behind one PCIe
switch and on one NUMA node, and what the idle devices are worth (fragmentation.py).
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fleet.model.assignment import ANY_NODE, GpuShare
from fleet.model.host import Accelerator, Gpu, HostImage, HostRecord, Reservation
from fleet.model.ids import HostId
from fleet.model.sandbox import Label, NetworkMode
from scheduler.placement.demand import DEVICE_MILLI, VCPU_MILLI
from scheduler.placement.fragmentation import NO_DEVICES, DeviceKind, Values
from scheduler.placement.hosts import AMOUNT_MAX, HostView, Share, sellable_of, share_of_reservation, vcpu_milli_of

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Shares of a whole are compared as integers in millionths: the same on every machine, unlike floats' sums.
WHOLE = 1_000_000
# Shares per unit are kept with this many bits behind the point: a 64 TiB host's MiB still has 6 digits, and sums stay in 63 bits.
SHARE_BITS = 20
# More devices in one host than any server board has; the arrays have as many rows as the largest host needs.
DEVICES_MAX = 16
ACCELERATORS = tuple(Accelerator)
# Interned values that may be of no host any more, beside as many as hosts can have: less than a megabyte.
STALE_MAX = 4_096
# The first rows of the block: what is free, of which all but the last have shares of a whole; IDLE are thousandths of devices.
VCPU, MEMORY, DISK, IDLE, SLOTS = range(5)
FREE, PER_UNIT = slice(0, 5), slice(5, 9)
ACCELERATOR, PART, HAS_DEVICES, WHOLE_DEVICES, VALUE, SWITCH_MOST, NODE_MOST, NODE_VCPU, NODE_MEMORY = range(9, 18)
# From here on what is free of each device, and then its kind.
DEVICE_ROWS = 18
UNBOUNDED = np.iinfo(np.int64).max

V = TypeVar("V", bound=Hashable)


class Interned(Generic[V]):
    """Values by small numbers: a class is compared with each value once, not with each host."""

    def __init__(self) -> None:
        self.values: list[V] = []
        self._numbers: dict[V, int] = {}

    def number(self, value: V) -> int:
        """The number of a value, a new one for a new value."""
        known = self._numbers.get(value)
        if known is None:
            known = self._numbers[value] = len(self.values)
            self.values.append(value)
        return known


@dataclass(slots=True)
class Board:
    """One host's devices and NUMA nodes with what is free of each, and the level of vCPUs that it was last looked at with."""

    gpus: tuple[Gpu, ...] = ()
    kind: int = 0
    slots: dict[str, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    level: int = -1
    nodes: dict[int, list[int]] = field(default_factory=dict)


class Change(Enum):
    """What of a host is another than before: nothing, what is left of it, or what it is as well."""

    NOTHING = auto()
    ROOM = auto()
    KIND = auto()


class Hosts:
    """The arrays. `ids` are sorted after `sort`; until then new hosts stand at the end."""

    def __init__(self) -> None:
        self.ids: list[HostId] = []
        self.index: dict[HostId, int] = {}
        self.views: list[HostView] = []
        self.boards: list[Board] = []
        self._forget_aspects()
        self.kinds: Interned[DeviceKind] = Interned()
        self.kinds.number(NO_DEVICES)
        self.is_sorted = True
        # Rises when hosts stand elsewhere than before.
        self.version = 0
        self.has_nodes = False
        self.values = Values()
        self._allocate(0, 0)

    _ASIDE = ("capacity", "status", "losses", "aspects")

    def _allocate(self, hosts: int, devices: int) -> None:
        self.room, self.devices = hosts, devices
        self.capacity = np.zeros((5, hosts), np.int64)
        self.status = np.zeros(hosts, np.int64)
        self.losses = np.zeros(hosts, np.int64)
        self.aspects = np.zeros((4, hosts), np.int64)
        self._divide(np.zeros((DEVICE_ROWS + 2 * devices, hosts), np.int64))

    def _divide(self, block: Ints) -> None:
        self.block = block
        self.free, self.per_unit = block[FREE], block[PER_UNIT]
        self.accelerator, self.part, self.has_devices = block[ACCELERATOR], block[PART], block[HAS_DEVICES]
        self.whole, self.value = block[WHOLE_DEVICES], block[VALUE]
        self.switch_most, self.node_most = block[SWITCH_MOST], block[NODE_MOST]
        self.device_kinds = DEVICE_ROWS + self.devices
        self.device_free, self.device_kind = block[DEVICE_ROWS : self.device_kinds], block[self.device_kinds :]

    def _forget_aspects(self) -> None:
        self.labels: Interned[frozenset[Label]] = Interned()
        self.taints: Interned[frozenset[Label]] = Interned()
        self.networks: Interned[frozenset[NetworkMode]] = Interned()
        self.images: Interned[tuple[HostImage, ...]] = Interned()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_overgrown(self) -> bool:
        """Whether most of the interned values are of hosts as they were once."""
        known = sum(len(one.values) for one in (self.labels, self.taints, self.networks, self.images))
        return known > STALE_MAX + 4 * len(self.ids)

    def intern_anew(self) -> None:
        """Forgets the values that no host has any more; rows made before are void."""
        self._forget_aspects()
        for place, view in enumerate(self.views):
            self._write_aspects(place, view.record)

    def put(self, view: HostView) -> tuple[int, Change]:
        """Takes up a host as it is; says where it stands and what of it is another than before."""
        host_id = view.record.host_id
        place = self.index.get(host_id)
        if place is not None and self.views[place].record == view.record:
            return place, self._renew(place, view)
        if place is None:
            place = len(self.ids)
            self.version += 1
            self.is_sorted = self.is_sorted and (not self.ids or self.ids[-1] < host_id)
            self.ids.append(host_id)
            self.index[host_id] = place
            self.views.append(view)
            self.boards.append(Board())
        self.views[place] = view
        self._make_room(len(self.ids), view.record)
        self._write(place, view)
        return place, Change.KIND

    def _renew(self, place: int, view: HostView) -> Change:
        """What is set aside on a host, and how it is, where its registration is as it was."""
        before = self.block[:, place].copy()
        status, losses = self.status[place], self.losses[place]
        self.views[place] = view
        reserved = view.reserved or Reservation(view.record.host_id)
        self._write_status(place, view)
        self._write_free(place, reserved)
        self._write_nodes(place, view)
        self._free_devices(place)
        self._shift_devices(place, reserved.gpus, 1)
        self.refresh(place)
        if (status, losses) != (self.status[place], self.losses[place]):
            return Change.KIND
        return Change.NOTHING if np.array_equal(before, self.block[:, place]) else Change.ROOM

    def drop(self, host_id: HostId) -> None:
        """Forgets a host."""
        place = self.index[host_id]
        self._arrange([one for one in range(len(self.ids)) if one != place])

    def sort(self) -> None:
        """Brings the hosts into the order of their ids."""
        self._arrange(sorted(range(len(self.ids)), key=self.ids.__getitem__))
        self.is_sorted = True

    def _arrange(self, order: list[int]) -> None:
        self.version += 1
        for name in self._ASIDE:
            setattr(self, name, np.ascontiguousarray(getattr(self, name)[..., order]))
        self.room = len(order)
        self._divide(np.ascontiguousarray(self.block[:, order]))
        self.ids = [self.ids[one] for one in order]
        self.views = [self.views[one] for one in order]
        self.boards = [self.boards[one] for one in order]
        self.index = {host_id: place for place, host_id in enumerate(self.ids)}

    def _make_room(self, hosts: int, record: HostRecord) -> None:
        devices = max(self.devices, min(len(record.gpus), DEVICES_MAX))
        if hosts <= self.room and devices == self.devices:
            return
        old = {name: getattr(self, name) for name in (*self._ASIDE, "device_free", "device_kind")}
        head = self.block[:DEVICE_ROWS]
        self._allocate(self.room if hosts <= self.room else hosts + hosts // 2 + 16, devices)
        self.block[:DEVICE_ROWS, : head.shape[1]] = head
        for name, array in old.items():
            getattr(self, name)[tuple(slice(0, size) for size in array.shape)] = array

    def _write(self, place: int, view: HostView) -> None:
        record, reserved = view.record, view.reserved or Reservation(view.record.host_id)
        vcpu_milli = vcpu_milli_of(record.capacity.vcpus, record.vcpu_overcommit_milli)
        offers, idle = sellable_of(record), min(len(record.gpus), DEVICES_MAX) * DEVICE_MILLI
        whole = (vcpu_milli, offers.memory_mib, offers.disk_mib, idle, offers.sandboxes)
        self.capacity[:, place] = whole
        self._write_free(place, reserved)
        self.per_unit[:, place] = [(WHOLE << SHARE_BITS) // max(1, amount) for amount in whole[:SLOTS]]
        self._write_status(place, view)
        self.accelerator[place] = ACCELERATORS.index(record.accelerator)
        self._write_aspects(place, record)
        self._write_devices(place, record, reserved)
        self._write_nodes(place, view)
        self.refresh(place)

    def _write_aspects(self, place: int, record: HostRecord) -> None:
        self.aspects[:, place] = (
            self.labels.number(frozenset(record.labels)),
            self.taints.number(frozenset(record.taints)),
            self.networks.number(frozenset(record.network_modes)),
            self.images.number(record.images),
        )

    def _write_status(self, place: int, view: HostView) -> None:
        self.status[place] = view.status
        self.losses[place] = len(view.losses.at_ms) if view.losses is not None else 0

    def _write_free(self, place: int, reserved: Reservation) -> None:
        used = share_of_reservation(reserved)
        taken = (used.vcpu_milli, used.memory_mib, used.disk_mib, 0, used.sandboxes)
        self.free[:, place] = self.capacity[:, place] - taken

    def _write_devices(self, place: int, record: HostRecord, reserved: Reservation) -> None:
        gpus = tuple(sorted(record.gpus, key=lambda gpu: gpu.device_id)[:DEVICES_MAX])
        kinds = [self.kinds.number(DeviceKind(gpu.model, gpu.memory_mib, gpu.is_shareable)) for gpu in gpus]
        kind = kinds[0] if kinds else 0
        self.boards[place] = Board(gpus, kind, {gpu.device_id: slot for slot, gpu in enumerate(gpus)})
        self.device_free[:, place] = 0
        self.device_kind[:, place] = 0
        self.device_kind[: len(gpus), place] = kinds
        self.part[place] = self.values.part_of(kind)
        self.has_devices[place] = bool(kinds)
        self._free_devices(place)
        self.whole[place] = self.value[place] = self.switch_most[place] = self.node_most[place] = 0
        self._shift_devices(place, reserved.gpus, 1)

    def _free_devices(self, place: int) -> None:
        board = self.boards[place]
        board.free, board.level = [DEVICE_MILLI] * len(board.gpus), -1
        self.device_free[: len(board.gpus), place] = DEVICE_MILLI

    def _write_nodes(self, place: int, view: HostView) -> None:
        nodes, overcommit = view.record.numa_nodes, view.record.vcpu_overcommit_milli
        self.block[NODE_VCPU, place] = self.block[NODE_MEMORY, place] = UNBOUNDED
        if len(nodes) < 2:
            return
        self.has_nodes = True
        free = {one.node: [vcpu_milli_of(one.vcpus, overcommit), min(one.memory_mib, AMOUNT_MAX)] for one in nodes}
        for one in view.numa_used:
            if one.node in free:
                free[one.node][0] -= one.vcpus * VCPU_MILLI
                free[one.node][1] -= one.memory_mib
        self.boards[place].nodes = free
        self.block[NODE_VCPU : NODE_MEMORY + 1, place] = max(free.values())

    def shift(self, place: int, share: Share, sign: int) -> None:
        """Gives a share away (1) or takes it back (-1)."""
        free = self.free
        free[VCPU, place] -= sign * share.vcpu_milli
        free[MEMORY, place] -= sign * share.memory_mib
        free[DISK, place] -= sign * share.disk_mib
        free[SLOTS, place] -= sign * share.sandboxes
        if share.numa_node != ANY_NODE:
            self._shift_node(place, share, sign)
        board = self.boards[place]
        if share.gpus:
            self._shift_devices(place, share.gpus, sign)
        if board.gpus:
            self.refresh(place)

    def _shift_devices(self, place: int, shares: tuple[GpuShare, ...], sign: int) -> None:
        board = self.boards[place]
        for one in shares:
            slot = board.slots.get(one.device_id)
            if slot is not None:
                board.free[slot] -= sign * one.milli
                # What is given away twice, by a reservation that is wrong, is not there; the look-ups know no less than nothing.
                self.device_free[slot, place] = max(0, board.free[slot])
        board.level = -1

    def _shift_node(self, place: int, share: Share, sign: int) -> None:
        nodes = self.boards[place].nodes
        node = nodes.get(share.numa_node)
        if node is not None:
            node[0] -= sign * share.vcpu_milli
            node[1] -= sign * share.memory_mib
            self.block[NODE_VCPU : NODE_MEMORY + 1, place] = max(nodes.values())

    def refresh(self, place: int) -> None:
        """What follows from a host's free devices and vCPUs, where they are others than at the last look."""
        board = self.boards[place]
        level = self.values.level_of(int(self.free[VCPU, place]))
        if board.level == level or not board.gpus:
            return
        is_new, board.level = board.level < 0, level
        free = board.free
        self.value[place] = self.values.of_host(board.kind, level, free)
        if not is_new:
            return
        self.free[IDLE, place] = sum(one for one in free if one > 0)
        self.whole[place] = free.count(DEVICE_MILLI)
        switches: dict[str, int] = {}
        nodes: dict[int, int] = {}
        for gpu, left in zip(board.gpus, free, strict=True):
            if left == DEVICE_MILLI:
                switches[gpu.pcie_switch] = switches.get(gpu.pcie_switch, 0) + 1
                nodes[gpu.numa_node] = nodes.get(gpu.numa_node, 0) + 1
        self.switch_most[place] = max(switches.values(), default=0)
        self.node_most[place] = max(nodes.values(), default=0)

    def set_values(self, values: Values) -> None:
        """What idle devices are worth from now on."""
        self.values = values
        for place in np.flatnonzero(self.has_devices[: len(self.ids)]).tolist():
            board = self.boards[place]
            board.level, self.part[place] = -1, values.part_of(board.kind)
            self.refresh(place)
