"""`mb host cordon`."""

from dataclasses import asdict

import click

from mb.commands.options import examples, json_option, operate, print_json


@click.command(
    epilog=examples("mb host cordon rack1-07", 'mb host cordon rack1-07 --reason "disk is replaced on Monday"')
)
@click.argument("host_id", metavar="HOST")
@click.option("--reason", default="", help="Why, in one line: mb host ls shows it.")
@json_option
@click.pass_context
def command(ctx: click.Context, host_id: str, *, reason: str, as_json: bool) -> None:
    """Place no new sandboxes on HOST. Those that are on it run on. For operators."""
    host = operate(ctx, lambda operator: operator.cordon_host(host_id, reason))
    if as_json:
        print_json(asdict(host))
    else:
        click.echo(f"{host_id} is cordoned: {host.reserved.sandboxes} on it run on, nothing new is placed there")
