"""`mb down`: the reverse of `mb up`."""

from pathlib import Path

import click

from mb.commands.destroy import destroy_all, wait_option
from mb.commands.options import examples, json_option


@click.command(
    epilog=examples("mb down                the sandbox of the jcard here", "mb down agents/fix", "mb down fix-tests")
)
@click.argument("path", metavar="[PATH|NAME]", default=".")
@wait_option
@json_option
@click.pass_context
def command(ctx: click.Context, path: str, *, wait: bool, as_json: bool) -> None:
    """Destroy the sandbox that mb up makes of the jcard at PATH (a file or its folder; default: here), results included.

    Where there is no jcard it is the sandbox of that NAME.
    """
    from mb.prepare import has_jcard, load_jcard  # noqa: PLC0415 (a sandbox by name needs no jcard)

    is_path = has_jcard(Path(path)) or "/" in path or path.startswith(".")
    name = load_jcard(Path(path), "name").spec.name if is_path else path
    destroy_all(ctx, [name], wait=wait, as_json=as_json)
