"""Packs guestd into one zipapp of compiled modules, the same bytes for the same sources."""

import io
import tempfile
import zipfile
from pathlib import Path

from fleet.errors import HostFaultError
from provisioning.command import run_command

COMPILE_TIMEOUT_S = 120.0
# The earliest time a zip can say.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)

_ENTRY = "import sys\nfrom guestd.__main__ import main\nsys.exit(main())\n"


def find_guestd_sources(project: Path) -> list[Path]:
    """The modules of guestd, in order."""
    found = sorted((project / "guestd").rglob("*.py"))
    if not found:
        raise HostFaultError("guestd_missing", f"{project / 'guestd'} has no modules", "build from a whole checkout")
    return found


def pack_guestd(project: Path, root: Path) -> bytes:
    """The zipapp, compiled by the Python inside `root`: the guest must not compile at each boot."""
    with tempfile.TemporaryDirectory(prefix=".guestd-", dir=root / "tmp") as name:
        staging = Path(name)
        for path in find_guestd_sources(project):
            target = staging / path.relative_to(project)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        inside = f"/tmp/{staging.name}"  # noqa: S108 (a folder made a moment ago, in a tree nobody else sees)
        program = ["chroot", str(root), "/usr/bin/python3", "-I", "-m", "compileall", "-q", "-b"]
        arguments = ["--invalidation-mode", "unchecked-hash", "-s", inside, inside]
        run_command([*program, *arguments], timeout_s=COMPILE_TIMEOUT_S)
        return _zip(staging)


def _zip(staging: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py", ZIP_EPOCH), _ENTRY)
        for path in sorted(staging.rglob("*.pyc")):
            archive.writestr(zipfile.ZipInfo(str(path.relative_to(staging)), ZIP_EPOCH), path.read_bytes())
    return stream.getvalue()
