"""`mb cp`."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fleet.model.units import MIB, render_bytes
from mb.commands.options import call, examples, json_option, notify, print_json
from mb.commands.programs import user_option
from mb.render.text import clean, count

if TYPE_CHECKING:
    from mb.client import Client
    from mb.copying import Copied

# A copy that takes longer than this says how far it is, as often.
SAID_S = 2.0

_EXAMPLES = examples(
    "mb cp notes.txt fix-tests:/workspace/",
    "mb cp fix-tests:/workspace/out results    a file or a folder",
    "tar -c a b | mb cp - fix-tests:/workspace",
    "mb cp fix-tests:/workspace - > all.tar    as the guest made it",
    "mb cp --user root fix-tests:/var/log logs",
)


@click.command(epilog=_EXAMPLES)
@click.argument("source", metavar="SRC")
@click.argument("dest", metavar="DST")
@user_option
@click.option("--with-git", is_flag=True, help="Also git's own folder, .git. Git runs what is in it.")
@json_option
@click.pass_context
def command(ctx: click.Context, source: str, dest: str, *, user: str, with_git: bool, as_json: bool) -> None:
    """Copy files or folders between here and a running sandbox; NAME:PATH on one side, as with cp -r.

    SRC goes into DST where that is a folder, else it becomes DST. A `-` is a tar: on stdin it is unpacked into the folder DST, on
    stdout it holds what the guest sends. What comes out is not trusted: symlinks that lead outside, and .git, are left behind.
    """
    from_name, from_path = _split(source)
    to_name, to_path = _split(dest)
    if bool(from_name) is bool(to_name):
        raise click.UsageError("one side is in a sandbox: NAME:PATH; a path here with a colon is written ./a:b")
    if to_name and not to_path:
        raise click.UsageError("name a path in the sandbox: NAME:PATH")
    if dest == "-" and sys.stdout.isatty():
        raise click.UsageError("a tar is nothing for a terminal; send it to a file")
    meter = _Meter()

    async def copy(client: "Client") -> "Copied":
        from mb.copying import Guest, copy_in, copy_out, pass_out  # noqa: PLC0415 (imports gRPC)

        guest = Guest(client, await client.get_sandbox(from_name or to_name), user)
        if to_name:
            return await copy_in(guest, None if source == "-" else Path(source), to_path, meter.say)
        if dest == "-":
            return await pass_out(guest, from_path, meter.say)
        return await copy_out(guest, from_path, Path(dest), meter.say, with_git=with_git)

    copied = call(ctx, copy, about=from_name or to_name)
    for reason, number in copied.left.items():
        notify(f"left alone: {count(number, 'path')}: {clean(reason)}")
    if not as_json:
        notify(f"copied {render_bytes(copied.size_bytes)} in {meter.spent()}")
    elif dest != "-":
        print_json(asdict(copied))


def _split(text: str) -> tuple[str, str]:
    """The sandbox and the path that an argument names; no sandbox for a path here."""
    name, colon, path = text.partition(":")
    return (name, path or ".") if colon and name and "/" not in name and not name.startswith(".") else ("", text)


class _Meter:
    """Says now and then how far a long copy is."""

    def __init__(self) -> None:
        self._started_s = self._said_s = time.monotonic()

    def say(self, size_bytes: int) -> None:
        """So many bytes went over."""
        now_s = time.monotonic()
        if now_s - self._said_s >= SAID_S:
            self._said_s = now_s
            notify(f"{render_bytes(size_bytes)} so far, {self._rate(size_bytes)}")

    def spent(self) -> str:
        """The time since the start."""
        return f"{time.monotonic() - self._started_s:.1f} s"

    def _rate(self, size_bytes: int) -> str:
        return f"{size_bytes / MIB / (time.monotonic() - self._started_s):.1f} MiB/s"
