"""`mb host uncordon`."""

from dataclasses import asdict

import click

from mb.commands.options import examples, json_option, operate, print_json


@click.command(epilog=examples("mb host uncordon rack1-07"))
@click.argument("host_id", metavar="HOST")
@json_option
@click.pass_context
def command(ctx: click.Context, host_id: str, *, as_json: bool) -> None:
    """Let HOST take sandboxes again. For operators."""
    host = operate(ctx, lambda operator: operator.uncordon_host(host_id))
    if as_json:
        print_json(asdict(host))
    else:
        click.echo(f"{host_id} takes sandboxes again")
