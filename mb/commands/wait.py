"""`mb wait`."""

import sys
from typing import TYPE_CHECKING

import click

from fleet.model.sandbox import Phase
from mb.commands.options import WaitedLongEnough, call, examples, json_option, name_argument, notify, print_json, within
from mb.exits import Exit
from mb.moments import parse_span_s
from mb.render.progress import Progress
from mb.render.sandbox import to_json

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from mb.client import Client


@click.command(epilog=examples("mb wait fix-tests", "mb wait fix-tests --timeout 10m --json"))
@name_argument
@click.option("--timeout", default="", metavar="SPAN", help="Wait at most so long, such as 10m; then exit 124.")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, *, timeout: str, as_json: bool) -> None:
    """Wait for the end of the sandbox NAME; exit 0 when every agent completed, else 3, as mb up does."""
    wait_s = parse_span_s(timeout, "--timeout") if timeout else None
    try:
        sandbox = call(ctx, lambda client: within(wait_s, _wait(client, name)))
    except WaitedLongEnough:
        notify(f"{name} has not ended after {timeout}; it runs on")
        ctx.exit(Exit.TIMED_OUT)
    if as_json:
        print_json(to_json(sandbox))
    else:
        click.echo(f"{sandbox.spec.name} {sandbox.phase}")
    ctx.exit(Exit.OK if sandbox.phase is Phase.COMPLETED else Exit.ENDED_BADLY)


async def _wait(client: "Client", name: str) -> "Sandbox":
    from mb.follow import watch_to_end  # noqa: PLC0415 (imports gRPC)

    progress = Progress(sys.stderr)
    return await watch_to_end(client, await client.get_sandbox(name), progress.show, progress.say, secrets={})
