"""`mb budget prices`."""

from dataclasses import asdict

import click

from mb.commands.options import examples, json_option, keep_books, print_json
from mb.limits import parse_money
from mb.render.budgets import render_prices


@click.command(epilog=examples("mb budget prices", "mb budget prices --vcpu-hour 0.04 --gpu-hour 2.10"))
@click.option("--vcpu-hour", help="Of one vCPU for an hour.")
@click.option("--gpu-hour", help="Of one device for an hour.")
@click.option("--egress-gib", help="Of a GiB that leaves.")
@json_option
@click.pass_context
def command(ctx: click.Context, /, *, as_json: bool, **prices: str | None) -> None:
    """Show what a unit costs in the operator's currency; with an option, set it: what is charged already stays as it is."""
    changes = {f"{name}_micro": parse_money(text, name) for name, text in prices.items() if text is not None}
    found = keep_books(ctx, lambda books: books.change_prices(changes))
    if as_json:
        print_json(asdict(found))
    else:
        click.echo("\n".join(render_prices(found)))
