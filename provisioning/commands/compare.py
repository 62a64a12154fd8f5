"""Says where two images differ: the first file, and in a filesystem or an archive the first paths."""

import json
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provisioning.build import FILES
from provisioning.command import run_command
from provisioning.cpio import read_cpio
from provisioning.manifest import MANIFEST_NAME
from provisioning.verify import digest_file

EXTRACT_TIMEOUT_S = 300.0
# One cause seldom shows in more places than this; all of them would bury it.
NAMES_MAX = 10


def first_difference(one: Path, other: Path) -> str:
    """The first file of two images' folders that is not the same, and what is not in it; empty when all are."""
    for role, name in FILES.items():
        if digest_file(one / name) == digest_file(other / name):
            continue
        if role == "root":
            return f"{name}: {_compare_roots(one / name, other / name)}"
        if role == "initramfs":
            members = [dict(read_cpio((folder / name).read_bytes())) for folder in (one, other)]
            return f"{name}: {_different_keys(*members) or 'the headers'}"
        return name
    manifests = [json.loads((folder / MANIFEST_NAME).read_bytes()) for folder in (one, other)]
    different = _different_keys(*manifests)
    return f"{MANIFEST_NAME}: {different}" if different else ""


def describe_tree(root: Path) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Every path below `root` with everything about it that an image keeps."""
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = ""
        if stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        elif stat.S_ISREG(status.st_mode):
            content = digest_file(path)
        yield str(path.relative_to(root)), (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, content)


def _compare_roots(one: Path, other: Path) -> str:
    with tempfile.TemporaryDirectory(prefix="bedplate-compare-", dir="/var/tmp") as name:
        trees = []
        for number, image in enumerate((one, other)):
            target = Path(name) / str(number)
            run_command(["fsck.erofs", f"--extract={target}", str(image)], timeout_s=EXTRACT_TIMEOUT_S)
            trees.append(dict(describe_tree(target)))
        return _different_keys(*trees) or "the layout; every path is the same"


def _different_keys(one: dict[str, Any], other: dict[str, Any]) -> str:
    different = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    return ", ".join(different[:NAMES_MAX]) + (f" and {len(different) - NAMES_MAX} more" * (len(different) > NAMES_MAX))
