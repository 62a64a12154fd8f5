"""How fast the product's Cluster decides, by the number of hosts, with all constraints on.

Hosts have racks and zones, taints, several images, two NUMA nodes, overcommit; a third have GPUs of four models behind PCIe
switches; some are dead, cordoned or backing off; all are partly taken. Sandboxes of 32 request classes (parts of devices, whole
ones, several, models, labels, tolerations, preferred labels) of 50 tenants come and go: sources, parents near and away, hosts to
avoid. Once as many are placed as `--standing` says, each arrival is followed by the departure of the oldest.

A decision is `choose` and `take`; its latency is that of both, with all the catching up that they need. Decisions per second
include the departures. Everything is drawn from one seed. On a machine with other work the columns with CPU time say what the
cluster took; on a quiet one both agree.

    ./dev bench decisions --hosts 1000,5000 --decisions 20000
"""

import argparse
import json
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.measure import describe_machine, keep_result, render, resident_mib_now
from fleet.model.assignment import GpuShare
from fleet.model.host import Accelerator, Capacity, Gpu, HostImage, HostRecord, NumaNode, Reservation
from fleet.model.ids import Digest, HostId, Tenant
from fleet.model.sandbox import Affinity, ImageRef, Label, NetworkMode
from scheduler.placement.cluster import Cluster
from scheduler.placement.demand import Demand, Wish, shape_of
from scheduler.placement.hosts import HostView, Share

HOSTS = (1_000, 5_000, 10_000, 50_000)
RACK_HOSTS = 40
RACKS_IN_ZONE = 25
MODELS = ("A100", "H100", "L4", "T4")
IMAGES = tuple(HostImage(f"image-{number}:latest", Digest(f"sha256:{number:064x}")) for number in range(4))
TENANTS = tuple(Tenant(f"tenant-{number}") for number in range(50))
SOURCES = tuple(Digest(f"sha256:{number:064x}") for number in range(100, 140))
TRAINING = Label("for", "training")
SEED = 7
# Sandboxes that each class is used for before anything is timed: its row is there by then, as it is in a scheduler that runs.
WARM_UP = 20


def main() -> int:
    """Measures each size and prints a table."""
    parser = argparse.ArgumentParser(
        "./dev bench decisions", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hosts", default=",".join(map(str, HOSTS)), help="sizes, separated by commas (%(default)s)")
    parser.add_argument("--decisions", type=int, default=20_000, help="timed decisions of each size (%(default)s)")
    parser.add_argument("--standing", type=int, default=4_000, help="sandboxes that stand at a time (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="also keep the result in benchmarks/results")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": describe_machine(), "hosts": {}}
    for hosts in map(int, options.hosts.split(",")):
        found["hosts"][str(hosts)] = measure(hosts, options.decisions, options.standing)
    first = found["hosts"].get("5000")
    if first is not None:
        for row in found["hosts"].values():
            row["cost of 5,000"] = round(first["per CPU second"] / row["per CPU second"], 2)
    if options.save:
        keep_result("decisions", found)
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0


def measure(hosts: int, decisions: int, standing: int) -> dict[str, Any]:
    """One size: decisions per second, latency in microseconds, memory in MiB."""
    chance = random.Random(SEED)
    before = resident_mib_now()
    cluster = build_cluster(chance, hosts)
    classes = demands(chance)
    names = [HostId(name_of(number)) for number in range(hosts)]
    placed: deque[tuple[HostId, Share]] = deque()
    asked = _arrivals(chance, classes, names)
    for _ in range(len(classes) * WARM_UP + standing):
        _decide(cluster, placed, *next(asked), standing)
    arrivals = [next(asked) for _ in range(decisions)]
    refused, samples = 0, []
    started, started_cpu = time.perf_counter(), time.process_time()
    for demand, wish in arrivals:
        took_s, took_cpu_s, is_placed = _decide(cluster, placed, demand, wish, standing)
        samples.append((took_s, took_cpu_s))
        refused += not is_placed
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    wall, cpu = (sorted(column) for column in zip(*samples, strict=True))
    return {
        "per second": round(decisions / seconds),
        "per CPU second": round(decisions / cpu_seconds),
        **{f"p{part} us": round(wall[len(wall) * part // 100] * 1e6, 1) for part in (50, 99)},
        "p99 CPU us": round(cpu[len(cpu) * 99 // 100] * 1e6, 1),
        "max CPU us": round(cpu[-1] * 1e6, 1),
        "refused": refused,
        "MiB": round(resident_mib_now() - before, 1),
    }


def _decide(
    cluster: Cluster,
    placed: deque[tuple[HostId, Share]],
    demand: Demand,
    wish: Wish,
    standing: int,
) -> tuple[float, float, bool]:
    """Wall clock and CPU time of one decision in seconds, and whether there was a host; then the oldest sandbox departs."""
    started, started_cpu = time.perf_counter(), time.thread_time()
    choice = cluster.choose(demand, wish)
    if choice is not None:
        cluster.take(choice.host_id, choice.share)
    took_s, took_cpu_s = time.perf_counter() - started, time.thread_time() - started_cpu
    if choice is not None:
        placed.append((choice.host_id, choice.share))
    if len(placed) > standing:
        cluster.give_back(*placed.popleft())
    return took_s, took_cpu_s, choice is not None


def build_cluster(chance: random.Random, hosts: int) -> Cluster:
    """So many hosts, partly taken."""
    cluster = Cluster()
    for number in range(hosts):
        cluster.upsert_host(_view(chance, number))
    cluster.set_popularity([(shape_of(demand), 1) for demand in demands(random.Random(SEED))])
    for tenant in TENANTS:
        for digest in chance.sample(SOURCES, 4):
            holders = {HostId(name_of(chance.randrange(hosts))) for _ in range(10)}
            cluster.set_holders(tenant, digest, holders)
    return cluster


def name_of(number: int) -> str:
    """A host's id."""
    return f"host-{number:06}"


def _view(chance: random.Random, number: int) -> HostView:
    vcpus = chance.choice((32, 64, 96, 128))
    memory_mib = vcpus * chance.choice((4096, 8192))
    gpus = _gpus(chance) if chance.random() < 1 / 3 else ()
    rack = number // RACK_HOSTS
    record = HostRecord(
        host_id=HostId(name_of(number)),
        address="",
        capacity=Capacity(vcpus, memory_mib, vcpus * 20_000, 2 * vcpus),
        labels=(
            Label("rack", f"rack-{rack}"),
            Label("zone", f"zone-{rack // RACKS_IN_ZONE}"),
            Label("disk", chance.choice(("nvme", "hdd"))),
        ),
        images=tuple(chance.sample(IMAGES, 3)),
        accelerator=Accelerator.KVM if chance.random() < 0.95 else Accelerator.TCG,
        accelerator_reason="",
        network_modes=(NetworkMode.NONE, NetworkMode.CLOSED),
        version="",
        registered_at_ms=0,
        vcpu_overcommit_milli=chance.choice((1000, 1500, 2000)),
        gpus=gpus,
        numa_nodes=(NumaNode(0, vcpus // 2, memory_mib // 2), NumaNode(1, vcpus // 2, memory_mib // 2)),
        taints=(TRAINING,) if gpus and chance.random() < 0.2 else (),
    )
    part = chance.uniform(0.2, 0.8)
    reserved = Reservation(
        record.host_id,
        int(vcpus * part),
        int(memory_mib * part),
        int(record.capacity.disk_mib * part),
        int(vcpus * part),
        tuple(GpuShare(gpu.device_id, chance.choice((0, 0, 250, 500, 1000))) for gpu in gpus),
    )
    return HostView(
        record,
        is_alive=chance.random() < 0.98,
        is_cordoned=chance.random() < 0.02,
        is_backing_off=chance.random() < 0.01,
        reserved=reserved,
        tenant_counts={chance.choice(TENANTS): 1},
    )


def _gpus(chance: random.Random) -> tuple[Gpu, ...]:
    model, count = chance.choice(MODELS), chance.choice((2, 4, 8))
    return tuple(
        Gpu(f"0000:{slot:02x}:00.0", model, 40_960, slot * 2 // count, f"switch-{slot // 2}", is_shareable=True)
        for slot in range(count)
    )


def demands(chance: random.Random) -> list[Demand]:
    """Request classes: half of them want devices."""
    found = []
    for number in range(32):
        vcpus = chance.choice((1, 2, 4, 8))
        image = ImageRef(IMAGES[number % len(IMAGES)].name)
        demand = Demand(vcpus * 1000, vcpus * 4096, vcpus * 2048, network_mode=NetworkMode.CLOSED, image=image)
        if number % 2:
            gpus, milli = chance.choice(((1, 250), (1, 500), (1, 1000), (1, 1000), (2, 1000), (4, 1000)))
            models = tuple(chance.sample(MODELS, 2)) if number % 3 == 0 else ()
            demand = replace(demand, gpus=gpus, gpu_milli=milli, gpu_models=models)
        if number % 4 == 0:
            demand = replace(demand, labels=(Label("disk", "nvme"),))
        if number % 5 == 0:
            demand = replace(demand, tolerations=(TRAINING,))
        if number % 6 == 0:
            demand = replace(demand, prefer_labels=(Label("zone", "zone-0"),))
        found.append(demand)
    return found


def _arrivals(
    chance: random.Random, classes: Sequence[Demand], names: Sequence[HostId]
) -> Iterator[tuple[Demand, Wish]]:
    while True:
        parent = chance.randrange(len(names))
        yield (
            chance.choice(classes),
            Wish(
                tenant=chance.choice(TENANTS),
                sources=(chance.choice(SOURCES),) if chance.random() < 0.3 else (),
                affinity=chance.choice((Affinity.ANY, Affinity.ANY, Affinity.NEAR, Affinity.AWAY)),
                parent_host=names[parent],
                parent_rack=f"rack-{parent // RACK_HOSTS}",
                avoid_hosts=frozenset({chance.choice(names)}) if chance.random() < 0.05 else frozenset(),
            ),
        )


if __name__ == "__main__":
    sys.exit(main())
