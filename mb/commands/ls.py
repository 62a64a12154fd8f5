"""`mb ls`."""

import time

import click

from mb.commands.options import call, examples, json_option, print_json
from mb.render.sandbox import render_listing, to_json


@click.command(epilog=examples("mb ls", "mb ls --json", "mb --tenant lab ls    for operators: one tenant's"))
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List sandboxes, the newest first. Operators see every tenant's.

    JSON leaves out the agents' commands, prompts and environments; mb status NAME --json has them.
    """
    sandboxes = call(ctx, lambda client: client.list_sandboxes())
    if as_json:
        print_json([to_json(sandbox) for sandbox in sandboxes])
    else:
        click.echo("\n".join(render_listing(sandboxes, time.time_ns() // 1_000_000)))
