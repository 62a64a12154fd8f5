"""`mb host ls`."""

from dataclasses import asdict

import click

from mb.commands.options import examples, json_option, operate, print_json
from mb.render.hosts import render_hosts


@click.command(epilog=examples("mb host ls", "mb host ls --json"))
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List hosts: alive or not, accelerator, what is set aside of what they can carry, images. For operators."""
    hosts = operate(ctx, lambda operator: operator.list_hosts())
    if as_json:
        print_json([asdict(host) for host in hosts])
    else:
        click.echo("\n".join(render_hosts(hosts)))
