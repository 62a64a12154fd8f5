"""Which devices of a chosen host a sandbox gets, and which NUMA node. PURE.

Of parts, the device whose use costs the least worth, as its row has counted it; of whole devices, those that reach each other
fastest: the PCIe switch with the fewest free ones that suffice, else such a NUMA node, else the first by their ids.
"""

from collections.abc import Iterable, Sequence

from fleet.model.assignment import ANY_NODE, GpuShare
from fleet.model.host import Gpu
from scheduler.placement.columns import VCPU, Hosts
from scheduler.placement.demand import DEVICE_MILLI
from scheduler.placement.fragmentation import FREES
from scheduler.placement.rows import Row


def choose_devices(row: Row, place: int) -> tuple[GpuShare, ...]:
    """The devices for the row's class on a host that can carry it, in the order of their ids."""
    hosts, demand = row.hosts, row.demand
    board = hosts.boards[place]
    free = board.free
    eligible = row.eligible(hosts.device_kind[: len(free), place]).tolist()
    able = [(gpu, slot) for slot, gpu in enumerate(board.gpus) if eligible[slot] and free[slot] >= demand.gpu_milli]
    if demand.is_fraction:
        costs = _costs(row, place, free)
        chosen = [gpu for gpu, _ in sorted(able, key=lambda one: (costs[one[1]], one[1]))[: demand.gpus]]
    else:
        chosen = _nearest([gpu for gpu, _ in able], demand.gpus)
    return tuple(GpuShare(device_id, demand.gpu_milli) for device_id in sorted(gpu.device_id for gpu in chosen))


def _costs(row: Row, place: int, free: Sequence[int]) -> list[int]:
    """What giving a part of each device away costs in worth, with the host's vCPUs already given."""
    hosts, milli = row.hosts, row.demand.gpu_milli
    values, kind = hosts.values, hosts.boards[place].kind
    level = values.level_of(int(hosts.free[VCPU, place]) - row.demand.vcpu_milli)
    table = values.table[kind, level]
    counts = table[FREES:]
    whole = free.count(DEVICE_MILLI)
    opening = int(counts[whole] - counts[whole - 1]) if whole else 0
    return [
        int(table[one] - table[one - milli]) + (opening if one == DEVICE_MILLI else 0) if one >= milli else 0
        for one in free
    ]


def _nearest(able: list[Gpu], wanted: int) -> list[Gpu]:
    for groups in (_groups((gpu.pcie_switch, gpu) for gpu in able), _groups((str(gpu.numa_node), gpu) for gpu in able)):
        enough = [group for group in groups if len(group) >= wanted]
        if enough:
            return min(enough, key=len)[:wanted]
    return able[:wanted]


def _groups(named: Iterable[tuple[str, Gpu]]) -> list[list[Gpu]]:
    """Devices by the group they are in, in the order of their first ones."""
    groups: dict[str, list[Gpu]] = {}
    for name, gpu in named:
        groups.setdefault(name, []).append(gpu)
    return list(groups.values())


def choose_node(hosts: Hosts, place: int, need: tuple[int, int], gpus: Sequence[GpuShare]) -> int:
    """The NUMA node that holds `need` (thousandths of vCPUs, MiB): the devices' own, else the one it fills best; else ANY_NODE."""
    record = hosts.views[place].record
    if len(record.numa_nodes) == 1:
        return record.numa_nodes[0].node
    able = [
        (memory - need[1], node)
        for node, (vcpus, memory) in hosts.boards[place].nodes.items()
        if vcpus >= need[0] and memory >= need[1]
    ]
    if gpus and len(able) > 1:
        where = {gpu.device_id: gpu.numa_node for gpu in record.gpus}
        nodes = {where[one.device_id] for one in gpus}
        able = [one for one in able if nodes == {one[1]}] or able
    return min(able, default=(0, ANY_NODE))[1]
