"""The image builder's command line: `python -m provisioning build | lock | rebuild | ls | verify`."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from fleet.errors import BedplateError
from fleet.model.units import render_bytes
from provisioning.commands.building import build, lock
from provisioning.commands.rebuild import rebuild
from provisioning.imagestore import image_path, list_images
from provisioning.recipe import list_recipes
from provisioning.verify import verify_image

DEFAULT_CACHE = "/var/cache/bedplate"

_EPILOG = """examples:
  python -m provisioning build                 build the image `base`, or find that it is up to date
  python -m provisioning rebuild               build it twice, apart in everything: are the bytes the same?
  python -m provisioning lock --recipe base    take the package versions that are offered now
  python -m provisioning ls --json             what is in the store
  python -m provisioning verify sha256:…       read every byte of an image and compare its digests
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 when it succeeded, 1 for an error that it has printed."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except BedplateError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.next_step:
            print(f"  next: {error.next_step}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def _list(options: argparse.Namespace) -> int:
    images = list_images(options.images)
    if options.json:
        print(json.dumps([asdict(image) for image in images], indent=2))
        return 0
    for image in images:
        state = image.problem or render_bytes(image.size_bytes)
        print(f"{image.digest}  {','.join(image.tags) or '-':24} {state}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    manifest = verify_image(image_path(options.images, options.digest), options.digest)
    if options.json:
        print(json.dumps({"digest": options.digest, "name": manifest.name, "whole": True}))
    else:
        print(f"{options.digest} is whole: {manifest.name}, {len(manifest.packages)} packages")
    return 0


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("provisioning", description=__doc__, epilog=_EPILOG, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recipes = ", ".join(list_recipes())
    _add(commands, "build", build, "build an image", "images", "cache", "recipe")
    _add(commands, "rebuild", rebuild, "build an image twice and compare", "cache", "recipe")
    command = _add(commands, "lock", lock, "take the package versions offered now")
    command.add_argument("--recipe", action="append", help=f"which recipe (all: {recipes})")
    _add(commands, "ls", _list, "list images", "images")
    command = _add(commands, "verify", _verify, "check an image byte by byte", "images")
    command.add_argument("digest", help="sha256:… of the image")
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    *options: str,
) -> argparse.ArgumentParser:
    cache = Path(os.environ.get("BEDPLATE_CACHE", DEFAULT_CACHE))
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print JSON")
    if "images" in options:
        command.add_argument("--images", type=Path, default=cache / "images", help="the image store (%(default)s)")
    if "cache" in options:
        command.add_argument("--cache", type=Path, default=cache, help="where packages are kept (%(default)s)")
    if "recipe" in options:
        command.add_argument("--recipe", default="base", help="which recipe (%(default)s)")
    return command


if __name__ == "__main__":
    sys.exit(main())
