"""One placement by Ganeti's `hail` and by the product's Cluster: the same machine, cluster and requests, in one run.

A cluster is described once, in the JSON that `hail` reads (Debian's ganeti-htools): nodes with 64 CPUs, each with ten instances.
The Cluster takes up the very same description. Both place the same requests, each against the cluster as described: nothing stays
taken. `hail` is one process for each request, reads the description and looks for one node for a plain instance; it runs with
--no-capacity-checks, without which it looks at every failure of a node as well and takes longer. What it takes for reading alone is
told too: a run that stops at a request that is none. The Cluster's first column takes up the description for one decision; its
second is a decision of a scheduler that runs, with what it takes and gives back.

    ./dev bench hail --nodes 100,1000 --requests 3
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.bare import IMAGE, bare_host
from benchmarks.measure import describe_machine, keep_result, render, summary
from fleet.model.host import Capacity, HostRecord, Reservation
from fleet.model.ids import HostId
from fleet.model.sandbox import ImageRef
from scheduler.placement.cluster import Cluster
from scheduler.placement.demand import Demand
from scheduler.placement.hosts import HostView

HAIL = "/usr/lib/ganeti/iallocators/hail"
CPUS, MEMORY_MIB, DISK_MIB = 64, 262_144, 2_097_152
VCPU_RATIO = 2
INSTANCES = 10
GROUP = "group-1"
SEED = 7
# A decision takes microseconds: each request is decided so many times, and the mean is taken.
REPEATS = 2_000
# One run of hail at thousands of nodes.
TIMEOUT_S = 900.0

Description = dict[str, Any]


def main() -> int:
    """Measures each size and prints the ratios."""
    parser = argparse.ArgumentParser(
        "./dev bench hail", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nodes", default="100,1000", help="sizes, separated by commas (%(default)s)")
    parser.add_argument("--requests", type=int, default=3, help="placements of each size (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="also keep the result in benchmarks/results")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": describe_machine(), "seconds of one placement": {}}
    for nodes in map(int, options.nodes.split(",")):
        found["seconds of one placement"][f"{nodes} nodes"] = _measure(nodes, options.requests)
    if options.save:
        keep_result("hail", found)
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0


def _measure(nodes: int, requests: int) -> dict[str, float]:
    chance = random.Random(SEED)
    described = describe_cluster(chance, nodes)
    wanted = [describe_request(chance, number) for number in range(requests)]
    hail_s = summary([_run_hail(described, request) for request in wanted])["median"]
    reading_s = _run_hail(described, {"type": "none"}, is_answered=False)
    started = time.perf_counter()
    cluster = take_up(described)
    assert cluster.choose(demand_of(wanted[0])) is not None
    first_s = time.perf_counter() - started
    warm_s = _decide(cluster, [demand_of(request) for request in wanted])
    return {
        "hail": hail_s,
        "hail, reading only": round(reading_s, 4),
        "first of Cluster": round(first_s, 6),
        "Cluster": round(warm_s, 8),
        "hail to Cluster": round(hail_s / warm_s),
    }


def describe_cluster(chance: random.Random, nodes: int) -> Description:
    """A cluster as `hail` reads it, half full, without a request."""
    described: Description = {"cluster_tags": [], "enabled_hypervisors": ["kvm"], "nodegroups": {GROUP: _group()}}
    described["nodes"], described["instances"] = {}, {}
    for number in range(nodes):
        name = f"node{number:05}"
        instances = [_instance(chance, name) for _ in range(INSTANCES)]
        described["instances"].update({f"{name}-{slot}": one for slot, one in enumerate(instances)})
        described["nodes"][name] = _node(number, instances)
    return described


def _group() -> Description:
    bounds = {"disk-count": 16, "nic-count": 8, "spindle-use": 8}
    least = dict.fromkeys(("cpu-count", "disk-count", "nic-count", "spindle-use"), 1) | {
        "disk-size": 1,
        "memory-size": 1,
    }
    most = {"cpu-count": CPUS, "memory-size": MEMORY_MIB, "disk-size": DISK_MIB, **bounds}
    policy = {
        "disk-templates": ["plain"],
        "minmax": [{"min": least, "max": most}],
        "std": least,
        "spindle-ratio": 32.0,
        "vcpu-ratio": float(VCPU_RATIO),
    }
    return {"name": "default", "alloc_policy": "preferred", "ipolicy": policy, "networks": [], "tags": []}


def _instance(chance: random.Random, node: str) -> Description:
    vcpus = chance.choice((1, 2, 4, 8))
    return {
        **_machine(vcpus, vcpus * 2_048, vcpus * 8_192),
        "nodes": [node],
        "admin_state": "up",
        "admin_state_source": "admin",
    }


def _machine(vcpus: int, memory_mib: int, disk_mib: int) -> Description:
    return {
        "vcpus": vcpus,
        "memory": memory_mib,
        "disk_space_total": disk_mib,
        "disks": [{"mode": "rw", "size": disk_mib, "spindles": 1}],
        "disk_template": "plain",
        "spindle_use": 1,
        "hypervisor": "kvm",
        "nics": [],
        "os": "debian",
        "tags": [],
    }


def _node(number: int, instances: Sequence[Description]) -> Description:
    memory_mib = sum(one["memory"] for one in instances)
    return {
        "group": GROUP,
        "total_cpus": CPUS,
        "reserved_cpus": 0,
        "total_memory": MEMORY_MIB,
        "reserved_memory": 0,
        "free_memory": MEMORY_MIB - memory_mib,
        "total_disk": DISK_MIB,
        "free_disk": DISK_MIB - sum(one["disk_space_total"] for one in instances),
        "total_spindles": 1,
        "free_spindles": 1,
        "i_pri_memory": memory_mib,
        "i_pri_up_memory": memory_mib,
        "primary_ip": f"10.0.{number // 250}.{number % 250}",
        "secondary_ip": f"10.1.{number // 250}.{number % 250}",
        "ndparams": {"exclusive_storage": False, "oob_program": None, "spindle_count": 1},
        **dict.fromkeys(("drained", "offline"), False),
        **dict.fromkeys(("master_candidate", "master_capable", "vm_capable"), True),
        "tags": [],
    }


def describe_request(chance: random.Random, number: int) -> Description:
    """One instance to place, as `hail` reads it."""
    vcpus = chance.choice((1, 2, 4, 8))
    machine = _machine(vcpus, vcpus * 2_048, vcpus * 8_192)
    return {**machine, "type": "allocate", "name": f"new-{number}", "required_nodes": 1}


def _run_hail(described: Description, request: Description, *, is_answered: bool = True) -> float:
    """How long `hail` takes, in seconds; raises RuntimeError where it finds no node for a request that it must answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="bedplate-hail-") as file:
        json.dump({**described, "request": request}, file)
        file.flush()
        started = time.perf_counter()
        command = [HAIL, "--no-capacity-checks", file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        took_s = time.perf_counter() - started
    if is_answered and (done.returncode or not json.loads(done.stdout)["success"]):
        raise RuntimeError(f"hail ended with {done.returncode}: {done.stdout[:500]}{done.stderr[:500]}")
    return took_s


def take_up(described: Mapping[str, Any]) -> Cluster:
    """The described cluster as the product has it."""
    cluster = Cluster()
    vcpus = dict.fromkeys(described["nodes"], 0)
    sandboxes = dict.fromkeys(described["nodes"], 0)
    for instance in described["instances"].values():
        (node,) = instance["nodes"]
        vcpus[node] += instance["vcpus"]
        sandboxes[node] += 1
    for name, node in described["nodes"].items():
        memory_mib = node["total_memory"] - node["free_memory"]
        disk_mib = node["total_disk"] - node["free_disk"]
        reserved = Reservation(HostId(name), vcpus[name], memory_mib, disk_mib, sandboxes[name])
        cluster.upsert_host(HostView(_record(name, node), reserved=reserved))
    return cluster


def _record(name: str, node: Mapping[str, Any]) -> HostRecord:
    capacity = Capacity(node["total_cpus"], node["total_memory"], node["total_disk"], 1000)
    return replace(bare_host(name, capacity), vcpu_overcommit_milli=VCPU_RATIO * 1000)


def demand_of(request: Mapping[str, Any]) -> Demand:
    """The request as the product has it."""
    image = ImageRef(IMAGE.name)
    return Demand(request["vcpus"] * 1000, request["memory"], request["disk_space_total"], image=image)


def _decide(cluster: Cluster, demands: Sequence[Demand]) -> float:
    """Seconds of one decision: with each the chosen host changes and changes back, so that every row has to be kept up."""
    for demand in demands:
        cluster.choose(demand)
    started = time.perf_counter()
    for _ in range(REPEATS):
        for demand in demands:
            choice = cluster.choose(demand)
            assert choice is not None
            cluster.take(choice.host_id, choice.share)
            cluster.give_back(choice.host_id, choice.share)
    return (time.perf_counter() - started) / REPEATS / len(demands)


if __name__ == "__main__":
    if not Path(HAIL).exists():
        sys.exit(f"{HAIL} is not there: ./dev bench hail installs it (ganeti-htools)")
    sys.exit(main())
