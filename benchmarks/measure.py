"""What every benchmark shares: an embedded fleet to measure, `mb` as its user, samples and their summaries, the machine's name."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from provisioning.__main__ import DEFAULT_CACHE
from provisioning.embedded.fleet import EmbeddedFleet, FleetSettings, start_fleet

RESULTS = Path(__file__).parent / "results"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 1024**2
# One `mb` of a benchmark, which may run a sandbox to its end on a busy machine.
RUN_TIMEOUT_S = 900.0
# What offers no event is looked at this often.
LOOK_S = 0.2
WIDTH = 80

_JCARD = """name = "{name}"
[resources]
cpus = 1
memory = "{memory}"
disk = "{disk}"
[network]
mode = "closed"
[[shared]]
host = "."
guest = "/workspace"
[agent]
name = "worker"
harness = "custom"
memory = "192MiB"
command = {command}
"""


@contextmanager
def running_fleet(vcpus: int = 0, memory_mib: int = 0) -> Iterator[tuple[EmbeddedFleet, Path]]:
    """A whole fleet as in the demo, and a folder for projects; 0 offers sandboxes what the machine has."""
    images_dir = Path(os.environ.get("BEDPLATE_CACHE", DEFAULT_CACHE)) / "images"
    with tempfile.TemporaryDirectory(prefix="bedplate-bench-", dir="/var/tmp") as name:
        folder = Path(name) / "fleet"
        folder.mkdir()
        Path(name).chmod(0o711)
        settings = FleetSettings(images_dir, vcpus, memory_mib)
        fleet = start_fleet(folder, settings, lambda text: print(text, file=sys.stderr))
        try:
            yield fleet, Path(name)
        finally:
            fleet.stop()


def write_project(
    folder: Path, name: str, command: Sequence[str], memory: str = "512MiB", disk: str = "256MiB"
) -> Path:
    """A folder with a jcard whose one agent, `worker`, runs `command`."""
    project = folder / name
    project.mkdir()
    content = _JCARD.format(name=name, memory=memory, disk=disk, command=json.dumps(list(command)))
    (project / "jcard.toml").write_text(content)
    return project


def run_mb(fleet: EmbeddedFleet, *arguments: str) -> str:
    """What `mb` prints as the fleet's tenant; raises RuntimeError when it fails."""
    env = {**os.environ, "BEDPLATE_CONFIG": str(fleet.tenant_config)}
    command = [sys.executable, "-m", "mb", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"mb {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def wait_phase(fleet: EmbeddedFleet, name: str, phase: str) -> dict[str, Any]:
    """The sandbox once it is in `phase`; raises TimeoutError."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while True:
        sandbox: dict[str, Any] = json.loads(run_mb(fleet, "status", name, "--json"))
        if sandbox["phase"] == phase:
            return sandbox
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} was not {phase} within {RUN_TIMEOUT_S:.0f} s")
        time.sleep(LOOK_S)


def timed(action: Callable[[], object]) -> float:
    """How many seconds `action` took."""
    started = time.monotonic()
    action()
    return time.monotonic() - started


def watch_idle(pids: Mapping[str, int], idle_s: float) -> dict[str, dict[str, float]]:
    """CPU in percent of one core over `idle_s`, and resident memory in MiB at its end, of each process."""
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    time.sleep(idle_s)
    return {
        name: {"cpu_percent": round(100 * (cpu_s(pid) - before[name]) / idle_s, 2), "resident_mib": resident_mib(pid)}
        for name, pid in pids.items()
    }


def cpu_s(pid: int) -> float:
    """User and system time of a process and of the children it has waited for (proc(5), fields 14 to 17)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / TICKS_PER_S


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return round(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MIB, 1)


def resident_mib_now() -> float:
    """Resident memory of this process."""
    return resident_mib(os.getpid())


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and number of samples."""
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return {"median": round(statistics.median(ordered), 4), "p99": round(p99, 4), "runs": len(ordered)}


def describe_machine() -> dict[str, Any]:
    """The machine that was measured."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    qemu = shutil.which("qemu-system-x86_64")
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout if qemu else "none\n"
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cpus": os.cpu_count(),
        "memory_gib": round(memory_kib / 1024**2, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": said.splitlines()[0],
    }


def keep_result(name: str, found: Mapping[str, Any]) -> None:
    """Keeps a result in benchmarks/results under its name, the day and the machine's kind."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{time.strftime('%Y-%m-%d')}-{platform.machine()}-{found['machine']['cpus']}cpu.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(f"kept in {path}", file=sys.stderr)


def render(found: Mapping[str, Any]) -> str:
    """Every table of a benchmark as text."""
    lines = []
    for title, rows in found.items():
        lines.append(title)
        is_table = bool(rows) and all(isinstance(values, dict) for values in rows.values())
        for name, values in rows.items() if is_table else [("", rows)]:
            text = "  ".join(f"{key}\N{NO-BREAK SPACE}{value}" for key, value in values.items())
            lines += textwrap.wrap(f"  {name:18}{text}", WIDTH, subsequent_indent=" " * 20)
    return "\n".join(lines)
