"""How a fleet comes through faults: three members of etcd, three schedulers and six hosts, each on a machine of its own (a network
namespace), of which three hosts carry VMs under emulation and three simulated ones. Every process is the product's own.

In each round clients create, stop and destroy sandboxes while one fault strikes, drawn from the seed: a leading scheduler is
killed, paused past its lease, told to end, or cut off; etcd's leader is killed or paused; the network between any two machines, or
around a host, swallows packets, one way or both; hostd is killed, or a host lost; etcd's quota is full. Then all is mended, and
must be true: every sandbox that was acknowledged is there or was destroyed; each was started once by each of its placements, and
on one host at a time; reservations are their sums.

Failover is the time from the fault to the first placement, committed, of a sandbox that was asked for afterwards.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.failover.faults import FAULTS
from benchmarks.failover.rounds import Round, choose_faults, plan_rack, run_rounds, running_rack
from benchmarks.measure import describe_machine, summary
from fleet.telemetry import configure_logging
from provisioning.__main__ import DEFAULT_CACHE

RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    """Runs and prints; 0 when nothing was violated."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.failover", description=__doc__, formatter_class=formatter)
    parser.add_argument("--rounds", type=int, default=10, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of faults and their times (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="no round begins after these (%(default)s)")
    parser.add_argument("--real", type=int, default=3, help="hosts whose VMs are real (%(default)s)")
    parser.add_argument("--simulated", type=int, default=3, help="hosts whose VMs are simulated (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), help="these faults only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="also keep the result in benchmarks/results")
    options = parser.parse_args()
    configure_logging("failover", "error")
    found = _run(options)
    if options.save:
        _save(found)
    print(json.dumps(found, indent=2) if options.json else _render(found))
    return 1 if found["violations"] else 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    images_dir = Path(os.environ.get("BEDPLATE_CACHE", DEFAULT_CACHE)) / "images"
    chance = random.Random(options.seed)
    # A simulated guest dies with its hostd, and that is another fault.
    named = options.only or [name for name in FAULTS if options.real or name != "kill_hostd"]
    faults = choose_faults(chance, options.rounds, named)
    with running_rack(plan_rack(images_dir, options.real, options.simulated), _tell) as fleet:
        found = asyncio.run(run_rounds(fleet, chance, faults, _tell_round, options.minutes * 60))
    violations = [f"round {one['number']}: {text}" for one in found["rounds"] for text in one["problems"]]
    return {
        "machine": describe_machine(),
        "seed": options.seed,
        "hosts with real VMs": options.real,
        "hosts with simulated VMs": options.simulated,
        "failover, seconds": summarise(found["rounds"]),
        "violations": violations + found["left at the end"],
        **found,
    }


def summarise(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each fault's failovers: the median, the 99th percentile and the longest, to each of its steps."""
    found: dict[str, Any] = {}
    for name in FAULTS:
        measured = [one["report"]["failover"] for one in rounds if one["fault"] == name and one["report"]["failover"]]
        if measured:
            found[name] = {}
        for step in ("vacant_s", "elected_s", "placed_s"):
            samples = [one[step] for one in measured if one[step] is not None]
            if samples:
                found[name][step.removesuffix("_s")] = {**summary(samples), "max": max(samples)}
    return found


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell_round(done: Round) -> None:
    failover = done.report.failover
    placed = f"; placed after {failover.placed_s:.2f} s" if failover else ""
    elected = f", led after {failover.elected_s:.2f} s" if failover and failover.elected_s else ""
    _tell(f"{done.number:3} {done.duration_s:6.1f} s  {done.report.what}{placed}{elected}")
    for problem in done.problems:
        _tell(f"      VIOLATED: {problem}")


def _render(found: dict[str, Any]) -> str:
    lines = [f"{len(found['rounds'])} rounds, seed {found['seed']}, {found['sandboxes']} sandboxes"]
    for fault, steps in found["failover, seconds"].items():
        for step, values in steps.items():
            lines.append(f"  {fault:18} {step:8}" + "  ".join(f"{key} {value}" for key, value in values.items()))
    return "\n".join([*lines, f"violations: {len(found['violations'])}", *found["violations"]])


def _save(found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"failover-{time.strftime('%Y-%m-%d')}-{platform.machine()}-{found['machine']['cpus']}cpu.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    _tell(f"kept in {path}")


if __name__ == "__main__":
    sys.exit(main())
