"""`mb image`: the image store of this machine.

Images are the business of `provisioning`, which `mb` does not import: it runs it as a program of its own and hands on what it says.
"""

import subprocess
import sys

import click

from mb.cli import LazyGroup
from mb.commands.options import examples, json_option

_VERBS = {
    "ls": "List the images of this machine.",
    "inspect": "Show everything about an image.",
    "verify": "Check an image byte by byte.",
    "import": "Take an image from a file.",
    "export": "Write an image to one file.",
    "rm": "Remove an image.",
    "gc": "Remove images that nobody uses.",
}


class ImageGroup(LazyGroup):
    """A group whose verbs are made from their name: all of them run the same program."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (click's signature)
        """The verb's command."""
        return _COMMANDS.get(cmd_name)


def _run(verb: str, as_json: bool, images: str, *words: str) -> None:
    """Runs a verb to its end, its output being ours, and ends as it ends."""
    options = [*(["--images", images] if images else []), *(["--json"] if as_json else [])]
    done = subprocess.run([sys.executable, "-m", "provisioning", verb, *options, *words], check=False)
    raise SystemExit(done.returncode)


_images_option = click.option("--images", default="", help="The store; else images below $BEDPLATE_CACHE.")
_image_argument = click.argument("image", metavar="IMAGE")


@click.command("ls", help=_VERBS["ls"], epilog=examples("mb image ls", "mb image ls --json"))
@_images_option
@json_option
def _ls(as_json: bool, images: str) -> None:
    _run("ls", as_json, images)


def _simple(verb: str) -> click.Command:
    @click.command(verb, help=_VERBS[verb], epilog=examples(f"mb image {verb} base:latest", f"mb image {verb} 4372e6"))
    @_image_argument
    @_images_option
    @json_option
    def command(image: str, as_json: bool, images: str) -> None:
        _run(verb, as_json, images, "--", image)

    return command


@click.command("rm", help=_VERBS["rm"], epilog=examples("mb image rm 4372e6", "mb image rm --force node:latest"))
@_image_argument
@click.option("--force", is_flag=True, help="Also when a tag points at it; the tag goes too.")
@_images_option
@json_option
def _rm(image: str, force: bool, as_json: bool, images: str) -> None:
    _run("rm", as_json, images, *(["--force"] if force else []), "--", image)


@click.command("export", help=_VERBS["export"], epilog=examples("mb image export base:latest base.tar"))
@_image_argument
@click.argument("file", type=click.Path(dir_okay=False))
@_images_option
@json_option
def _export(image: str, file: str, as_json: bool, images: str) -> None:
    _run("export", as_json, images, "--", image, file)


@click.command("import", help=_VERBS["import"], epilog=examples("mb image import base.tar --digest sha256:…"))
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--digest", default="", help="Refuse the file unless it holds this image.")
@click.option("--tag", default="", help="The tag to point at it; else its name and :latest.")
@_images_option
@json_option
def _import(file: str, digest: str, tag: str, as_json: bool, images: str) -> None:
    words = [*(["--digest", digest] if digest else []), *(["--tag", tag] if tag else [])]
    _run("import", as_json, images, *words, "--", file)


@click.command("gc", help=_VERBS["gc"], epilog=examples("mb image gc --dry-run", "mb image gc --keep-used-within 90d"))
@click.option("--keep-used-within", default="30d", show_default=True, help="Keep what a VM started from lately.")
@click.option("--keep", default=1, show_default=True, type=click.IntRange(min=0), help="Keep the last used besides.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_images_option
@json_option
def _gc(keep_used_within: str, keep: int, dry_run: bool, as_json: bool, images: str) -> None:
    words = [f"--keep-used-within={keep_used_within}", f"--keep={keep}", *(["--dry-run"] if dry_run else [])]
    _run("gc", as_json, images, *words)


_COMMANDS = {
    "ls": _ls,
    "inspect": _simple("inspect"),
    "verify": _simple("verify"),
    "import": _import,
    "export": _export,
    "rm": _rm,
    "gc": _gc,
}

command = ImageGroup(
    "image",
    verbs={name: ("", text) for name, text in _VERBS.items()},
    help="Images on this machine. A host offers those with a tag; every byte is verified before a VM starts.",
)
