"""The demo: a whole fleet starts, an agent repairs a project in a VM of its own, and nothing of it is left behind."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from provisioning.embedded.fleet import EmbeddedFleet, FleetSettings, start_fleet
from provisioning.embedded.leaks import find_leaks, render_leaks

EXAMPLE = Path(__file__).parents[2] / "examples" / "fix-tests"
NAME = "fix-tests"
# A VM under emulation on a busy machine; only a run that hangs meets it.
STEP_TIMEOUT_S = 900.0


def run_demo(images_dir: Path, source: Path = EXAMPLE) -> int:
    """Runs the example from start to end; 0 when every step succeeded and nothing is left."""
    started = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    # Not below /tmp: QEMU's unprivileged user passes through, and /tmp may be private to somebody.
    with tempfile.TemporaryDirectory(prefix="bedplate-demo-", dir="/var/tmp") as name:
        fleet = start_fleet(Path(name), FleetSettings(images_dir), progress)
        try:
            failed = _run_steps(fleet, source)
            fleet.stop_control_plane()
            leaks = find_leaks(fleet.folder, fleet.endpoint)
        finally:
            fleet.stop()
    progress(render_leaks(leaks))
    if failed:
        print(f"the demo failed at: {failed}", file=sys.stderr)
    return 1 if failed or any(leaks.values()) else 0


def _run_steps(fleet: EmbeddedFleet, source: Path) -> str:
    """The steps in order; the first that fails, or nothing. The sandbox is destroyed whatever failed before."""
    tenant, operator = _mb(fleet.tenant_config), _mb(fleet.operator_config)
    steps: list[tuple[Callable[..., bool], tuple[str, ...]]] = [
        (operator, ("host", "ls")),
        (tenant, ("up", str(source))),
        (tenant, ("diff", NAME)),
        (tenant, ("ls",)),
        (tenant, ("status", NAME)),
    ]
    failed = ""
    for run, arguments in steps:
        if not run(*arguments):
            failed = "mb " + " ".join(arguments)
            break
    return failed if tenant("destroy", NAME) else failed or f"mb destroy {NAME}"


def _mb(config: Path) -> Callable[..., bool]:
    def run(*arguments: str) -> bool:
        print(f"\n$ mb {' '.join(arguments)}", flush=True)
        env = {**os.environ, "BEDPLATE_CONFIG": str(config)}
        done = subprocess.run([sys.executable, "-m", "mb", *arguments], env=env, timeout=STEP_TIMEOUT_S, check=False)
        return done.returncode == 0

    return run
