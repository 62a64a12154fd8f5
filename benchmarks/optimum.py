"""How many hosts the product's Cluster uses for a set of sandboxes, beside the fewest that can carry them (CP-SAT of OR-tools).

Small instances, so that the optimum is proven: equal hosts, sandboxes drawn from one seed with vCPUs, memory and disk in
proportions of their own. The Cluster places them one by one, as a plan does, and cannot move one again: as they arrive, and the
largest first (by the sum of their shares), as a burst may be ordered. An instance whose optimum is not proven in time counts with
its bound.

    ./dev bench optimum --instances 20 --sandboxes 120
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bare import IMAGE, bare_host
from benchmarks.measure import describe_machine, keep_result, render
from fleet.model.host import Capacity
from fleet.model.sandbox import ImageRef
from scheduler.placement.cluster import Cluster
from scheduler.placement.demand import Demand
from scheduler.placement.hosts import HostView

# ./dev makes it of requirements/optimum.txt.
SOLVER_PYTHON = Path(".cache/optimum/bin/python")
SOLVER = Path(__file__).parent / "bins.py"
SEED = 7
VCPUS, MEMORY_MIB, DISK_MIB = 32, 131_072, 1_048_576
ROOM = Capacity(VCPUS, MEMORY_MIB, DISK_MIB, 1000)
# Beyond the solver's own limit: starting it.
START_S = 60.0


def main() -> int:
    """Solves each instance both ways and prints the ratios."""
    parser = argparse.ArgumentParser(
        "./dev bench optimum", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--instances", type=int, default=20, help="how many (%(default)s)")
    parser.add_argument("--sandboxes", type=int, default=120, help="in each (%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=20.0, help="CP-SAT's limit for each (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="also keep the result in benchmarks/results")
    options = parser.parse_args()
    chance = random.Random(SEED)
    rows = [_measure(draw(chance, options.sandboxes), options.timeout_s) for _ in range(options.instances)]
    found = {
        "machine": describe_machine(),
        "instances": {str(number): row for number, row in enumerate(rows)},
        "hosts over the optimum's": {
            "as they arrive": _ratio(rows, "as they arrive"),
            "largest first": _ratio(rows, "largest first"),
            "proven": sum(row["optimum"] == row["bound"] for row in rows),
        },
    }
    if options.save:
        keep_result("optimum", found)
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0


def _ratio(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    ratios = [row[name] / row["bound"] for row in rows]
    total = sum(row[name] for row in rows) / sum(row["bound"] for row in rows)
    return {"of all": round(total, 4), "mean": round(statistics.fmean(ratios), 4), "worst": round(max(ratios), 4)}


def draw(chance: random.Random, sandboxes: int) -> list[Demand]:
    """An instance: sizes as agents have them, each with memory and disk in a proportion of its own."""
    return [_demand(chance) for _ in range(sandboxes)]


def _demand(chance: random.Random) -> Demand:
    vcpus = chance.choice((1, 2, 2, 4, 4, 8))
    memory_mib = vcpus * 1_024 * chance.choice((2, 4, 4, 8))
    return Demand(vcpus * 1_000, memory_mib, chance.choice((8, 16, 32, 64)) * 1_024, image=ImageRef(IMAGE.name))


def _measure(demands: Sequence[Demand], timeout_s: float) -> dict[str, Any]:
    arrived = hosts_used(demands)
    sorted_used = hosts_used(sorted(demands, key=_size, reverse=True))
    best = _solve(demands, min(arrived, sorted_used), timeout_s)
    return {
        "as they arrive": arrived,
        "largest first": sorted_used,
        "optimum": best["bins"],
        "bound": best["bound"],
        "CP-SAT s": best["seconds"],
    }


def _size(demand: Demand) -> int:
    shares = (demand.vcpu_milli / (VCPUS * 1000), demand.memory_mib / MEMORY_MIB, demand.disk_mib / DISK_MIB)
    return round(sum(shares) * 1_000_000)


def hosts_used(demands: Sequence[Demand]) -> int:
    """Hosts that carry something after all are placed, one after the other."""
    cluster = Cluster()
    for number in range(len(demands)):
        cluster.upsert_host(HostView(bare_host(f"host-{number:04}", ROOM)))
    used = set()
    for demand in demands:
        choice = cluster.choose(demand)
        assert choice is not None, "there is a host for each"
        cluster.take(choice.host_id, choice.share)
        used.add(choice.host_id)
    return len(used)


def _solve(demands: Sequence[Demand], at_most: int, timeout_s: float) -> dict[str, Any]:
    instance = {
        "bin": [VCPUS * 1000, MEMORY_MIB, DISK_MIB],
        "demands": [[demand.vcpu_milli, demand.memory_mib, demand.disk_mib] for demand in demands],
        "at_most": at_most,
        "timeout_s": timeout_s,
    }
    command = [str(SOLVER_PYTHON), str(SOLVER)]
    text = json.dumps(instance)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout_s + START_S, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
