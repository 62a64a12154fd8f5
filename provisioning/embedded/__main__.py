"""Embedded mode's command line: `python -m provisioning.embedded demo | up`, started by `./dev` in private namespaces."""

import argparse
import os
import sys
from pathlib import Path

from fleet.errors import BedplateError
from provisioning.__main__ import DEFAULT_CACHE
from provisioning.embedded.demo import run_demo
from provisioning.embedded.desk import run_desk


def main() -> int:
    """Runs one command; 0 when it succeeded, 1 for an error that it has printed."""
    parser = argparse.ArgumentParser("provisioning.embedded", description=__doc__)
    parser.add_argument("command", choices=["demo", "up"])
    cache = Path(os.environ.get("BEDPLATE_CACHE", DEFAULT_CACHE))
    parser.add_argument("--images", type=Path, default=cache / "images", help="the image store (%(default)s)")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="with up: what to run instead of a shell")
    options = parser.parse_args()
    if os.environ.get("BEDPLATE_PRIVATE") != "1":
        print("error: this makes bridges and mounts\n  next: start it with ./dev demo", file=sys.stderr)
        return 1
    try:
        return run_demo(options.images) if options.command == "demo" else run_desk(options.images, options.program)
    except BedplateError as error:
        print(f"error: {error.message}\n  next: {error.next_step}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
