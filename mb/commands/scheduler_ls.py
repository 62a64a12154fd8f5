"""`mb scheduler ls`."""

import time
from dataclasses import asdict

import click

from mb.commands.options import examples, json_option, operate, print_json
from mb.render.schedulers import render_schedulers


@click.command(epilog=examples("mb scheduler ls", "mb scheduler ls --json"))
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List schedulers: which one leads and since when, where each serves and since when. For operators."""
    schedulers = operate(ctx, lambda operator: operator.list_schedulers())
    if as_json:
        print_json([asdict(scheduler) for scheduler in schedulers])
    else:
        click.echo("\n".join(render_schedulers(schedulers, time.time_ns() // 1_000_000)))
