"""Packing of a production GPU cluster's trace by the product's own Cluster, beside what its authors published.

Data and procedure: "Beware of Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation Gradient Descent" (Weng et al.,
USENIX ATC 2023); lists of nodes and tasks as in hkust-adsl/kubernetes-scheduler-simulator, also those that you make yourself:

    ./dev bench openb --nodes openb_node_list_gpu_node.csv --tasks openb_pod_list_default.csv --seeds 10 --json

All hosts are free. The tasks, sorted by name and shuffled with the seed (42 and up), arrive once each; then uniformly drawn ones
again, until what was asked for reaches 130 % of all devices. Nobody leaves, waits or is evicted. Figures are what is allocated, in
% of all devices, when 100 % and 130 % have arrived, and how much of all devices is idle and fragmented then.

The authors shuffle in Go (math/rand, Fisher-Yates downwards, seeded with the seed), here it is Python's random.shuffle seeded
with the seed: the same seed is another order than theirs, so compare means over seeds, not seeds. The popularity of shapes is that
of the task list, as theirs is; the weights are the product's defaults.
"""

import argparse
import csv
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.bare import IMAGE, bare_host
from benchmarks.measure import describe_machine, keep_result, render
from fleet.model.host import Capacity, Gpu, HostRecord
from fleet.model.ids import HostId
from fleet.model.sandbox import ImageRef, NetworkMode
from scheduler.placement.cluster import Cluster
from scheduler.placement.demand import DEVICE_MILLI, Demand, Shape, shape_of
from scheduler.placement.hosts import HostView, Share

FIRST_SEED = 42
# What is asked for in the end, in % of all devices, and where figures are taken.
LOAD_MAX = 130
LOADS = (100, 130)
# Neither disk nor the number of sandboxes is in the trace: nobody lacks them.
SLOTS = 1 << 20
TABLES = {"allocated": "expected_analysis_allo_discrete.csv", "fragmented": "expected_analysis_frag_discrete.csv"}


@dataclass(frozen=True, slots=True)
class Run:
    """One seed: what was allocated and fragmented at each of LOADS in % of all devices, and how long it took."""

    seed: int
    allocated: Mapping[int, float]
    fragmented: Mapping[int, float]
    arrived: int
    placed: int
    seconds: float


def main() -> int:
    """Runs every seed and prints the means beside the published ones."""
    parser = argparse.ArgumentParser(
        "./dev bench openb", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nodes", type=Path, required=True, help="CSV with sn, cpu_milli, memory_mib, gpu, model")
    parser.add_argument("--tasks", type=Path, required=True, help="CSV of pods as in the trace")
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds, from 42 on (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="also keep the result in benchmarks/results")
    options = parser.parse_args()
    hosts, tasks = read_hosts(options.nodes), read_tasks(options.tasks)
    if not any(demand.gpus for demand in tasks) or not any(view.record.gpus for view in hosts):
        parser.error("neither list may be without GPUs: the load is counted in them")
    runs = [run_seed(hosts, tasks, FIRST_SEED + number) for number in range(options.seeds)]
    found = {
        "machine": describe_machine(),
        "lists": {"nodes": options.nodes.name, "tasks": options.tasks.name},
        **summarise(runs),
        "published means": published(options.nodes.parent, options.tasks.stem),
    }
    if options.save:
        keep_result(f"openb-{options.tasks.stem}", found)
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0


def read_hosts(path: Path) -> list[HostView]:
    """The hosts of a node list, all free; a device's model is its node's."""
    with path.open(newline="") as lines:
        return [HostView(_host(row)) for row in csv.DictReader(lines)]


def _host(row: Mapping[str, str]) -> HostRecord:
    gpus = tuple(Gpu(f"{slot:02}", row["model"], 0, is_shareable=True) for slot in range(int(row["gpu"] or 0)))
    # One vCPU, as many times over as the node has: a list may have parts of them.
    bare = bare_host(row["sn"], Capacity(1, int(row["memory_mib"]), 1, SLOTS))
    return replace(bare, vcpu_overcommit_milli=int(row["cpu_milli"]), gpus=gpus)


def read_tasks(path: Path) -> list[Demand]:
    """The tasks of a pod list in the order of their names."""
    with path.open(newline="") as lines:
        return [_demand(row) for row in sorted(csv.DictReader(lines), key=lambda row: row["name"])]


def _demand(row: Mapping[str, str]) -> Demand:
    gpus = int(row["num_gpu"] or 0)
    return Demand(
        vcpu_milli=int(row["cpu_milli"]),
        memory_mib=int(row["memory_mib"]),
        gpus=gpus,
        gpu_milli=int(row["gpu_milli"] or 0) or DEVICE_MILLI if gpus else DEVICE_MILLI,
        gpu_models=tuple(model for model in (row["gpu_spec"] or "").split("|") if model) if gpus else (),
        network_mode=NetworkMode.NONE,
        image=ImageRef(IMAGE.name),
    )


def run_seed(hosts: Sequence[HostView], tasks: Sequence[Demand], seed: int) -> Run:
    """Places the arriving tasks of one seed; reading the lists and setting the cluster up are not timed."""
    cluster = Cluster()
    for view in hosts:
        cluster.upsert_host(view)
    popularity = tuple(Counter(map(shape_of, tasks)).items())
    cluster.set_popularity(popularity)
    devices = sum(len(view.record.gpus) for view in hosts) * DEVICE_MILLI
    asked = given = arrived = placed = 0
    shares: dict[HostId, list[Share]] = {}
    allocated: dict[int, float] = {}
    fragmented: dict[int, float] = {}
    taken_s = 0.0
    started = time.perf_counter()
    for demand in arrivals(tasks, devices, seed):
        arrived += 1
        asked += demand.gpus * demand.gpu_milli
        choice = cluster.choose(demand)
        if choice is not None:
            cluster.take(choice.host_id, choice.share)
            shares.setdefault(choice.host_id, []).append(choice.share)
            placed += 1
            given += demand.gpus * demand.gpu_milli
        for load in LOADS:
            if load not in allocated and asked * 100 >= devices * load:
                taken_s += time.perf_counter() - started
                allocated[load] = 100 * given / devices
                fragmented[load] = 100 * fragmented_milli(hosts, shares, popularity) / devices
                started = time.perf_counter()
    return Run(seed, allocated, fragmented, arrived, placed, taken_s + time.perf_counter() - started)


def arrivals(tasks: Sequence[Demand], devices: int, seed: int) -> Iterator[Demand]:
    """The tasks as they arrive with a seed, until LOAD_MAX of `devices` thousandths has been asked for."""
    chance = random.Random(seed)
    order = list(tasks)
    chance.shuffle(order)
    asked, number = 0, 0
    while asked * 100 < devices * LOAD_MAX:
        demand = order[number] if number < len(order) else chance.choice(order)
        number += 1
        asked += demand.gpus * demand.gpu_milli
        yield demand


def fragmented_milli(
    hosts: Sequence[HostView], shares: Mapping[HostId, Sequence[Share]], shapes: Sequence[tuple[Shape, int]]
) -> float:
    """Idle device thousandths that the typical shapes cannot use where they are, by the shapes' popularity."""
    typical, total = _typical(shapes), 0.0
    for view in hosts:
        record, taken = view.record, shares.get(view.record.host_id, ())
        used = Counter[str]()
        for share in taken:
            used.update({one.device_id: one.milli for one in share.gpus})
        free = [DEVICE_MILLI - used[gpu.device_id] for gpu in record.gpus]
        vcpu_milli = record.vcpu_overcommit_milli - sum(share.vcpu_milli for share in taken)
        model = record.gpus[0].model if record.gpus else ""
        total += sum(part * (sum(free) - _usable(shape, vcpu_milli, free, model)) for shape, part in typical)
    return total


def _typical(shapes: Sequence[tuple[Shape, int]]) -> list[tuple[Shape, float]]:
    """The most frequent shapes, which cover 95 % of the tasks, with their parts of them."""
    ordered = sorted(shapes, key=lambda pair: -pair[1])
    total, kept, covered = sum(count for _, count in shapes), [], 0
    for shape, count in ordered:
        if covered * 100 >= total * 95:
            break
        covered += count
        kept.append((shape, count))
    return [(shape, count / covered) for shape, count in kept]


def _usable(shape: Shape, vcpu_milli: int, free: Sequence[int], model: str) -> int:
    """Thousandths of idle devices that a shape can use on a host; none where it cannot run."""
    able = [one for one in free if one >= shape.gpu_milli]
    is_apt = not shape.gpu_models or model in shape.gpu_models
    can_run = shape.gpus and is_apt and vcpu_milli >= shape.vcpu_milli and len(able) >= shape.gpus
    return sum(able) if can_run else 0


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Each seed, and over all seeds means with standard deviations."""
    found: dict[str, Any] = {"seeds": {}, "means": {}}
    for run in runs:
        found["seeds"][str(run.seed)] = {
            **{f"allocated at {load}": round(run.allocated[load], 2) for load in LOADS},
            **{f"fragmented at {load}": round(run.fragmented[load], 2) for load in LOADS},
            "tasks": run.arrived,
            "placed": run.placed,
            "tasks/s": round(run.arrived / run.seconds),
        }
    for name in ("allocated", "fragmented"):
        for load in LOADS:
            samples = [getattr(run, name)[load] for run in runs]
            found["means"][f"{name} at {load}"] = round(statistics.fmean(samples), 2)
            if name == "allocated" and len(samples) > 1:
                found["means"][f"sd at {load}"] = round(statistics.stdev(samples), 2)
    found["means"]["tasks/s"] = round(sum(run.arrived for run in runs) / sum(run.seconds for run in runs))
    return found


def published(folder: Path, workload: str) -> dict[str, dict[str, float]]:
    """The published means of each policy for a workload; nothing for one that is not in the tables beside the node list."""
    found: dict[str, dict[str, float]] = {}
    for name, table in TABLES.items():
        if not (folder / table).exists():
            continue
        with (folder / table).open(newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if row["workload"] == workload]
        for policy in sorted({row["sc_policy"] for row in rows}):
            own = [row for row in rows if row["sc_policy"] == policy]
            means = {
                f"{name} at {load}": round(statistics.fmean(float(row[str(load)]) for row in own), 2) for load in LOADS
            }
            found.setdefault(policy, {}).update(means)
    return found


if __name__ == "__main__":
    sys.exit(main())
