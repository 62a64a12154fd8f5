"""`rebuild`: is an image the same bytes when somebody else builds it elsewhere, later, and in another environment?

Each of two builds has an empty cache and store, and a copy of the builder of its own; only downloaded packages are shared, whose
digests are in the lock. Nothing about a build but the folder of the image store and of the cache is an argument of it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import HostFaultError
from provisioning.build import PROJECT
from provisioning.commands.compare import first_difference
from provisioning.imagestore import image_path, sole_builder

# Two whole builds of the largest recipe on a slow machine with a slow mirror.
BUILD_TIMEOUT_S = 3600.0
WORK_PREFIX = "rebuild-"
# What a build runs from: this program, what it imports, and what it packs.
SOURCES = ("fleet", "guestd", "provisioning")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where and as whom one build runs. `folder` is relative; `env` is all there is."""

    folder: str
    umask: int
    env: dict[str, str]


FIRST = Surroundings("a", 0o022, {"HOME": "/root", "USER": "root", "LOGNAME": "root", "LANG": "C.UTF-8", "TZ": "UTC"})
SECOND = Surroundings(
    "elsewhere/and much deeper/b",
    0o077,
    {
        "HOME": "/nonexistent",
        "USER": "builder",
        "LOGNAME": "builder",
        "LANG": "tr_TR.UTF-8",
        "LC_ALL": "tr_TR.UTF-8",
        "LANGUAGE": "tr",
        "TZ": "Pacific/Kiritimati",
        "PYTHONHASHSEED": "4711",
        "SOURCE_DATE_EPOCH": "1",
    },
)


def rebuild(options: argparse.Namespace) -> int:
    """Builds an image twice and compares; 0 when both are the same bytes."""
    with (
        sole_builder(options.cache / "rebuild", WORK_PREFIX),
        tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=options.cache / "rebuild") as name,
    ):
        folders, digests = [], []
        for number, surroundings in enumerate((FIRST, SECOND), start=1):
            print(f"build {number} of 2: umask {surroundings.umask:03o}, {surroundings.env}", file=sys.stderr)
            images_dir = Path(name) / surroundings.folder / "images"
            digest = _build(options.recipe, Path(name) / surroundings.folder, surroundings, options.cache / "debs")
            folders.append(image_path(images_dir, digest))
            digests.append(digest)
        difference = "" if digests[0] == digests[1] else first_difference(*folders)
    _print(options, digests, difference)
    return 0 if digests[0] == digests[1] else 1


def _print(options: argparse.Namespace, digests: list[str], difference: str) -> None:
    equal = digests[0] == digests[1]
    if options.json:
        print(json.dumps({"recipe": options.recipe, "digests": digests, "equal": equal, "difference": difference}))
        return
    print("\n".join(digests))
    print(f"{options.recipe}: equal" if equal else f"{options.recipe}: different, first in {difference}")


def _build(recipe: str, folder: Path, surroundings: Surroundings, debs_dir: Path) -> str:
    folder.mkdir(parents=True)
    for source in SOURCES:
        shutil.copytree(PROJECT / source, folder / "checkout" / source, ignore=shutil.ignore_patterns("__pycache__"))
    cache = folder / "cache"
    cache.mkdir()
    debs_dir.mkdir(parents=True, exist_ok=True)
    (cache / "debs").symlink_to(debs_dir.absolute())
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    places = ["--images", str(folder / "images"), "--cache", str(cache)]
    done = subprocess.run(
        [sys.executable, "-m", "provisioning", "build", "--json", "--recipe", recipe, *places],
        cwd=folder / "checkout",
        env={**proxies, **surroundings.env, "PATH": os.environ["PATH"]},
        umask=surroundings.umask,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise HostFaultError("build_failed", f"the build in {folder} ended with code {done.returncode}", "see above")
    return str(json.loads(done.stdout)["digest"])
