"""A whole fleet to play with: it runs as long as a shell in front of it, or one program, and leaves nothing behind."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fleet.errors import NotFoundError
from provisioning.embedded.fleet import EmbeddedFleet, FleetSettings, start_fleet
from provisioning.embedded.leaks import find_leaks, render_leaks

GREETING = """
A fleet of your own, as tenant `demo`; it ends with this shell.
  mb up examples/fix-tests     an agent repairs a project in a VM
  mb ls, mb status, mb logs, mb exec, mb shell, mb --help
  mb --config $OPERATOR host ls     the same fleet as its operator
"""
SHELL = ("bash", "--norc", "-i")


def run_desk(images_dir: Path, program: Sequence[str]) -> int:
    """Runs `program`, or a shell, in front of a fleet of its own; its exit code, or 1 when something is left behind.

    Raises NotFoundError `program_missing` before anything is started.
    """
    if program and shutil.which(program[0]) is None:
        raise NotFoundError(
            "program_missing", f"there is no program {program[0]!r}", "name one on PATH, or none for a shell"
        )
    started = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    # Not below /tmp: QEMU's unprivileged user passes through, and /tmp may be private to somebody.
    with tempfile.TemporaryDirectory(prefix="bedplate-up-", dir="/var/tmp") as name:
        fleet = start_fleet(Path(name), FleetSettings(images_dir), progress)
        try:
            if not program:
                print(GREETING, file=sys.stderr)
            code = subprocess.run(program or SHELL, env=_environment(fleet), check=False).returncode
            _destroy_all(fleet)
            fleet.stop_control_plane()
            leaks = find_leaks(fleet.folder, fleet.endpoint)
        finally:
            fleet.stop()
    progress(render_leaks(leaks))
    return code or int(any(leaks.values()))


def _environment(fleet: EmbeddedFleet) -> dict[str, str]:
    return {
        **os.environ,
        "BEDPLATE_CONFIG": str(fleet.tenant_config),
        "OPERATOR": str(fleet.operator_config),
        "FLEET": str(fleet.folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PS1": "bedplate> ",
    }


def _destroy_all(fleet: EmbeddedFleet) -> None:
    """What the user has left running would outlive hostd."""
    mb, env = [sys.executable, "-m", "mb"], _environment(fleet)
    listing = subprocess.run([*mb, "ls"], env=env, capture_output=True, text=True, check=False).stdout.splitlines()
    for line in listing[1:]:
        subprocess.run([*mb, "destroy", line.split()[-1]], env=env, stdout=sys.stderr, check=False)
