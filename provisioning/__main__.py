"""The image builder's command line: `python -m provisioning build | ls | verify`."""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from fleet.errors import BedplateError
from fleet.model.units import render_bytes
from provisioning.build import ensure_image
from provisioning.imagestore import image_path, list_images
from provisioning.recipe import load_recipe
from provisioning.verify import verify_image

DEFAULT_CACHE = "/var/cache/bedplate"

_EPILOG = """examples:
  python -m provisioning build                 build the image `base`, or find that it is up to date
  python -m provisioning ls --json             what is in the store
  python -m provisioning verify sha256:…       read every byte of an image and compare its digests
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 when it succeeded, 1 for an error that it has printed."""
    options = _parser().parse_args(arguments)
    try:
        commands = {"build": _build, "ls": _list, "verify": _verify}
        commands[options.command](options)
    except BedplateError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.next_step:
            print(f"  next: {error.next_step}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _build(options: argparse.Namespace) -> None:
    started = time.monotonic()

    def progress(step: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {step}", file=sys.stderr, flush=True)

    digest, is_new = ensure_image(load_recipe(options.recipe), options.images, options.cache, progress)
    duration_s = time.monotonic() - started
    if options.json:
        print(json.dumps({"digest": digest, "built": is_new, "duration_s": round(duration_s, 3)}))
    else:
        print(f"{options.recipe}:latest {digest} {'built' if is_new else 'up to date'} in {duration_s:.1f} s")


def _list(options: argparse.Namespace) -> None:
    images = list_images(options.images)
    if options.json:
        print(json.dumps([asdict(image) for image in images], indent=2))
        return
    for image in images:
        state = image.problem or render_bytes(image.size_bytes)
        print(f"{image.digest}  {','.join(image.tags) or '-':24} {state}")


def _verify(options: argparse.Namespace) -> None:
    manifest = verify_image(image_path(options.images, options.digest), options.digest)
    if options.json:
        print(json.dumps({"digest": options.digest, "name": manifest.name, "whole": True}))
        return
    print(f"{options.digest} is whole: {manifest.name}, {len(manifest.packages)} packages")


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("provisioning", description=__doc__, epilog=_EPILOG, formatter_class=formatter)
    cache = Path(os.environ.get("BEDPLATE_CACHE", DEFAULT_CACHE))
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("build", "build an image"), ("ls", "list images"), ("verify", "check an image byte by byte")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--images", type=Path, default=cache / "images", help="the image store (%(default)s)")
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "build":
            command.add_argument("--recipe", default="base", help="which recipe (%(default)s)")
            command.add_argument("--cache", type=Path, default=cache, help="where package trees are kept (%(default)s)")
        if name == "verify":
            command.add_argument("digest", help="sha256:… of the image")
    return parser


if __name__ == "__main__":
    sys.exit(main())
