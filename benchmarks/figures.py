"""The figures a newcomer asks for, on this machine: cold start by stage, `mb ls`, and what hostd and scheduler take while idle.

A fleet is started as in the demo, and everything goes through `mb`. Medians and 99th percentiles over the runs of one session; on a
shared machine they are orders of magnitude. `--json` prints every sample's summary for machines. `./dev bench boot` measures more.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import render, run_mb, running_fleet, summary, timed, wait_phase, watch_idle, write_project
from provisioning.embedded.fleet import EmbeddedFleet


def main() -> int:
    """Measures and prints; 0 when every run succeeded."""
    parser = argparse.ArgumentParser("benchmarks.figures", description=__doc__)
    parser.add_argument("--starts", type=int, default=5, help="cold starts (%(default)s)")
    parser.add_argument("--listings", type=int, default=30, help="runs of mb ls (%(default)s)")
    parser.add_argument("--idle-s", type=float, default=30.0, help="how long to watch idle programs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with running_fleet() as (fleet, folder):
        found = _measure(fleet, folder, options)
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0


def start_once(fleet: EmbeddedFleet, project: Path) -> dict[str, float]:
    """One sandbox from request to removal: the time of each stage since the request, in seconds."""
    sandbox = json.loads(run_mb(fleet, "up", str(project), "--json"))
    run_mb(fleet, "destroy", sandbox["sandbox_id"])
    stages = {
        stage["name"]: (stage["at_ms"] - sandbox["created_at_ms"]) / 1000 for stage in sandbox["status"]["stages"]
    }
    return {"assigned": (sandbox["assigned_at_ms"] - sandbox["created_at_ms"]) / 1000, **stages}


def summarise_stages(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Each stage that every run has reached."""
    return {stage: summary([run[stage] for run in runs]) for stage in runs[0] if all(stage in run for run in runs)}


def _measure(fleet: EmbeddedFleet, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    programs = {"hostd": fleet.hostd.pid, "scheduler": fleet.scheduler.pid}
    found: dict[str, Any] = {"idle, no sandbox": watch_idle(programs, options.idle_s)}
    quick = write_project(folder, "quick", ["echo", "hello"])
    runs = [start_once(fleet, quick) for _ in range(options.starts)]
    found["cold start, seconds since the request"] = summarise_stages(runs)
    waiting = write_project(folder, "waiting", ["sleep", "3600"])
    run_mb(fleet, "up", str(waiting), "--detach")
    wait_phase(fleet, "waiting", "running")
    found["mb ls, seconds"] = summary([timed(lambda: run_mb(fleet, "ls")) for _ in range(options.listings)])
    found["idle, one sandbox"] = watch_idle(programs, options.idle_s)
    run_mb(fleet, "destroy", "waiting")
    return found


if __name__ == "__main__":
    sys.exit(main())
