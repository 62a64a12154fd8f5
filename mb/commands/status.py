"""`mb status`."""

import time

import click

from mb.commands.options import call, examples, json_option, name_argument, print_json
from mb.render.sandbox import render_sandbox, to_json


@click.command(epilog=examples("mb status fix-tests", "mb status fix-tests --json"))
@name_argument
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show everything about the sandbox NAME (or its id): phase and reason, agents, stages, why it waits."""
    sandbox = call(ctx, lambda client: client.get_sandbox(name))
    if as_json:
        print_json(to_json(sandbox))
    else:
        click.echo("\n".join(render_sandbox(sandbox, time.time_ns() // 1_000_000)))
