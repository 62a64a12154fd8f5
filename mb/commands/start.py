"""`mb start`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fleet.errors import InvalidSpecError
from fleet.model.sandbox import Phase
from mb.commands.options import call, examples, json_option, name_argument, print_json
from mb.render.progress import Progress
from mb.render.sandbox import to_json

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from mb.client import Client

_NO_START = frozenset({Phase.RUNNING, Phase.COMPLETED, Phase.FAILED, Phase.REMOVING})
_EXAMPLES = examples(
    "mb start fix-tests              run it again, on the disk it has",
    "mb start fix-tests agents/fix   with the secrets of that jcard",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@click.argument("path", type=click.Path(path_type=Path), required=False)
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, path: Path | None, *, as_json: bool) -> None:
    """Run the agents of the stopped sandbox NAME again, on the disk it has.

    A sandbox with secrets forgot them when it was stopped: PATH is the jcard (a file or its folder) that has their values, and
    mb returns once they are sent.
    """
    sandbox = call(ctx, lambda client: _start(client, name, path))
    if as_json:
        print_json(to_json(sandbox))
    else:
        shown = sandbox.spec.name
        starts = "runs" if sandbox.phase is Phase.RUNNING else "starts again"
        click.echo(f"{shown} {starts}; mb logs {shown} --follow, mb status {shown}")


async def _start(client: "Client", name: str, path: Path | None) -> "Sandbox":
    from mb.secrets import deliver_secrets, load_values  # noqa: PLC0415 (imports gRPC)

    sandbox = await client.get_sandbox(name)
    values: dict[str, bytes] = {}
    # A start of one that runs, or has no disk any more, is refused or changes nothing: no secret is needed to hear that.
    if sandbox.spec.secrets and sandbox.phase not in _NO_START:
        if path is None:
            message = f"{sandbox.spec.name} needs its secrets again: {', '.join(sandbox.spec.secrets)}"
            next_step = f"name the jcard that has them: mb start {sandbox.spec.name} PATH"
            raise InvalidSpecError("secret_missing", message, next_step, field="PATH")
        values = load_values(path, sandbox)
    started = await client.start_sandbox(sandbox.sandbox_id)
    if not values:
        return started
    progress = Progress(sys.stderr)
    return await deliver_secrets(client, started, values, progress.show, progress.say)
