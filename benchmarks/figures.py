"""The figures a newcomer asks for, on this machine: cold start by stage, `mb ls`, and what hostd and scheduler take while idle.

A fleet is started as in the demo, and everything goes through `mb`. Medians and 99th percentiles over the runs of one session; on a
shared machine they are orders of magnitude. `--json` prints every sample's summary for machines.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provisioning.__main__ import DEFAULT_CACHE
from provisioning.embedded.fleet import EmbeddedFleet, FleetSettings, start_fleet

NAME = "figures"
JCARD = f"""name = "{NAME}"
[resources]
cpus = 1
memory = "512MiB"
disk = "256MiB"
[network]
mode = "closed"
[[shared]]
host = "."
guest = "/workspace"
[agent]
harness = "custom"
memory = "256MiB"
command = {{command}}
"""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 1024**2
RUN_TIMEOUT_S = 600.0


def main() -> int:
    """Measures and prints; 0 when every run succeeded."""
    parser = argparse.ArgumentParser("benchmarks.figures", description=__doc__)
    parser.add_argument("--starts", type=int, default=5, help="cold starts (%(default)s)")
    parser.add_argument("--listings", type=int, default=30, help="runs of mb ls (%(default)s)")
    parser.add_argument("--idle-s", type=float, default=30.0, help="how long to watch idle programs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    images_dir = Path(os.environ.get("BEDPLATE_CACHE", DEFAULT_CACHE)) / "images"
    with tempfile.TemporaryDirectory(prefix="bedplate-bench-", dir="/var/tmp") as name:
        folder = Path(name) / "fleet"
        folder.mkdir()
        Path(name).chmod(0o711)
        fleet = start_fleet(folder, FleetSettings(images_dir), lambda text: print(text, file=sys.stderr))
        try:
            found = _measure(fleet, Path(name), options)
        finally:
            fleet.stop()
    print(json.dumps(found, indent=2) if options.json else _render(found))
    return 0


def _measure(fleet: EmbeddedFleet, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"idle, no sandbox": _watch_idle(fleet, options.idle_s)}
    quick = _project(folder / "quick", '["echo", "hello"]')
    runs = [_start_once(fleet, quick) for _ in range(options.starts)]
    found["cold start, seconds since the request"] = {
        stage: _summary([run[stage] for run in runs]) for stage in runs[0] if all(stage in run for run in runs)
    }
    waiting = _project(folder / "waiting", '["sleep", "3600"]')
    _mb(fleet, "up", str(waiting), "--detach")
    _wait_running(fleet)
    found["mb ls, seconds"] = _summary([_time(fleet, "ls") for _ in range(options.listings)])
    found["idle, one sandbox"] = _watch_idle(fleet, options.idle_s)
    _mb(fleet, "destroy", NAME)
    return found


def _project(folder: Path, command: str) -> Path:
    folder.mkdir()
    (folder / "jcard.toml").write_text(JCARD.format(command=command))
    return folder


def _start_once(fleet: EmbeddedFleet, project: Path) -> dict[str, float]:
    """One sandbox from request to removal: each stage's time since the request."""
    sandbox = json.loads(_mb(fleet, "up", str(project), "--json"))
    _mb(fleet, "destroy", NAME)
    stages = {
        stage["name"]: (stage["at_ms"] - sandbox["created_at_ms"]) / 1000 for stage in sandbox["status"]["stages"]
    }
    return {"assigned": (sandbox["assigned_at_ms"] - sandbox["created_at_ms"]) / 1000, **stages}


def _wait_running(fleet: EmbeddedFleet) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while json.loads(_mb(fleet, "status", NAME, "--json"))["phase"] != "running":
        if time.monotonic() > deadline:
            raise TimeoutError(f"{NAME} did not run within {RUN_TIMEOUT_S:.0f} s")
        time.sleep(0.5)


def _watch_idle(fleet: EmbeddedFleet, idle_s: float) -> dict[str, Any]:
    programs = {"hostd": fleet.hostd.pid, "scheduler": fleet.scheduler.pid}
    before = {name: _cpu_s(pid) for name, pid in programs.items()}
    time.sleep(idle_s)
    return {
        name: {"cpu_percent": round(100 * (_cpu_s(pid) - before[name]) / idle_s, 2), "resident_mib": _resident_mib(pid)}
        for name, pid in programs.items()
    }


def _cpu_s(pid: int) -> float:
    """User and system time of a process and of the children it has waited for (proc(5), fields 14 to 17)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / TICKS_PER_S


def _resident_mib(pid: int) -> float:
    return round(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MIB, 1)


def _time(fleet: EmbeddedFleet, *arguments: str) -> float:
    started = time.monotonic()
    _mb(fleet, *arguments)
    return time.monotonic() - started


def _mb(fleet: EmbeddedFleet, *arguments: str) -> str:
    env = {**os.environ, "BEDPLATE_CONFIG": str(fleet.tenant_config)}
    command = [sys.executable, "-m", "mb", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"mb {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def _summary(samples: Sequence[float]) -> dict[str, float]:
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return {"median": round(statistics.median(ordered), 3), "p99": round(p99, 3), "runs": len(ordered)}


def _render(found: dict[str, Any]) -> str:
    lines = []
    for title, rows in found.items():
        lines.append(title)
        for name, values in rows.items() if all(isinstance(value, dict) for value in rows.values()) else [("", rows)]:
            lines.append(f"  {name:18}" + "  ".join(f"{key} {value}" for key, value in values.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
