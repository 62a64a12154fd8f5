"""`mb budget show`."""

from dataclasses import asdict

import click

from mb.commands.options import examples, json_option, keep_books, print_json
from mb.render.budgets import render_account


@click.command(epilog=examples("mb budget show", "mb budget show research", "mb budget show ~abcdefghij23 --json"))
@click.argument("account", default="")
@json_option
@click.pass_context
def command(ctx: click.Context, account: str, as_json: bool) -> None:
    """Show ACCOUNT (default: the tenant's own): each dimension with what is in use or used, and its limit."""
    found = keep_books(ctx, lambda books: books.get_account(account))
    if as_json:
        print_json(asdict(found))
    else:
        click.echo("\n".join(render_account(found)))
