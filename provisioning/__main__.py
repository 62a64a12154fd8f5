"""The image builder's command line: `python -m provisioning build | lock | rebuild | ls | gc …`."""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from fleet.errors import BedplateError, HostFaultError, InvalidSpecError
from provisioning.commands import stock
from provisioning.commands.building import build, lock
from provisioning.commands.rebuild import rebuild
from provisioning.recipe import list_recipes

# As argparse ends for a wrong command line.
INVALID = 2
# As wide as mb's own messages, among which these come.
COLUMNS = 80
DEFAULT_CACHE = "/var/cache/bedplate"

_EPILOG = """examples:
  python -m provisioning build                 build the image `base`, or find that it is up to date
  python -m provisioning rebuild               build it twice, apart in everything: are the bytes the same?
  python -m provisioning lock --recipe base    take the package versions that are offered now
  python -m provisioning ls --json             what is in the store
  python -m provisioning verify base:latest    read every byte of an image and compare its digests
  python -m provisioning export base:latest base.tar
  python -m provisioning gc --dry-run          which images nobody uses
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 when it succeeded, 1 or 2 (a wrong argument) for an error that it has printed."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except BedplateError as error:
        _print_error(error, options.json)
        return INVALID if isinstance(error, InvalidSpecError) else 1
    except BrokenPipeError:
        # Whoever read has seen enough; the interpreter must not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _print_error(HostFaultError("system_refused", str(error), "mend it and run this again"), options.json)
        return 1


def _print_error(error: BedplateError, as_json: bool) -> None:
    if as_json:
        field = error.field if isinstance(error, InvalidSpecError) else ""
        shown = {"code": error.code, "field": field, "message": error.message, "next_step": error.next_step}
        print(json.dumps({"error": shown}), file=sys.stderr)
        return
    for label, text in (("error: ", error.message), ("  next: ", error.next_step)):
        if text:
            print(_fill(label, text), file=sys.stderr)


def _fill(label: str, text: str) -> str:
    indent = " " * len(label)
    return textwrap.fill(text, COLUMNS, initial_indent=label, subsequent_indent=indent, break_on_hyphens=False)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("provisioning", description=__doc__, epilog=_EPILOG, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recipes = ", ".join(list_recipes())
    _add(commands, "build", build, "build an image", "images", "cache", "recipe")
    _add(commands, "rebuild", rebuild, "build an image twice and compare", "cache", "recipe")
    command = _add(commands, "lock", lock, "take the package versions offered now")
    command.add_argument("--recipe", action="append", help=f"which recipe (all: {recipes})")
    _add(commands, "ls", stock.ls, "list images", "images")
    _add_stock(commands)
    return parser


def _add_stock(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    image = "a tag (base:latest), a digest, or the beginning of one"
    for name, run, text in (
        ("inspect", stock.inspect, "show everything about an image"),
        ("verify", stock.verify, "check an image byte by byte"),
        ("export", stock.export, "write an image to one file"),
        ("rm", stock.rm, "remove an image"),
    ):
        command = _add(commands, name, run, text, "images")
        command.add_argument("image", metavar="IMAGE", help=image)
        if name == "rm":
            command.add_argument("--force", action="store_true", help="also when a tag points at it")
        if name == "export":
            command.add_argument("file", metavar="FILE", type=Path, help="the tar to write; must not exist")
    command = _add(commands, "import", stock.import_, "take an image from a file that export wrote", "images")
    command.add_argument("file", metavar="FILE", type=Path, help="the tar to read")
    command.add_argument("--digest", help="refuse the file unless it holds this image")
    command.add_argument("--tag", help="the tag to point at it (its name and :latest)")
    command = _add(commands, "gc", stock.gc, "remove images that nobody uses", "images")
    within = "keep what a VM was started from within this time (%(default)s): longer than any sandbox runs"
    command.add_argument("--keep-used-within", default="30d", metavar="TIME", help=within)
    command.add_argument("--keep", type=int, default=1, metavar="N", help="keep the N last used besides (%(default)s)")
    command.add_argument("--dry-run", action="store_true", help="only say what would go")


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
