"""Programs taken out of the package tree: run on the build host, or put into the initramfs, with the libraries of the tree.

The tree's versions are locked, the host's are not: what these programs write is the same on every host.
"""

import shutil
from pathlib import Path

from fleet.errors import HostFaultError
from provisioning.command import run_command

LIST_TIMEOUT_S = 30.0
# Where the tree keeps its libraries; inside the root, /lib is a link into /usr.
LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"
# The x86-64 ABI's name for the loader, which every dynamic program asks for.
LOADER_ALIAS = "lib64/ld-linux-x86-64.so.2"


def needed_files(root: Path, program: str) -> tuple[str, ...]:
    """What a dynamic program of the tree needs to run, by path in the root: itself, the loader, and its libraries."""
    said = run_command([*_loaded(root), "--list", str(root / program)], timeout_s=LIST_TIMEOUT_S)
    libraries = []
    for line in said.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if not arrow or name.endswith(LOADER_ALIAS):
            continue
        path = Path(rest.rpartition(" (")[0])
        if not path.is_relative_to(root):
            raise HostFaultError("program_incomplete", f"{program} needs {name}, which is not in the tree")
        libraries.append(str(path.relative_to(root)))
    return (program, LOADER, *sorted(libraries))


def keep_program(root: Path, program: str, folder: Path) -> list[str]:
    """Copies a program of the tree with all it needs into `folder`, and answers how to call it from the host."""
    for path in needed_files(root, program):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, target)
    return [*_loaded(folder), str(folder / program)]


def _loaded(root: Path) -> list[str]:
    return [str(root / LOADER), "--inhibit-cache", "--library-path", str(root / LIBRARIES)]
