"""`mb budget ls`."""

from dataclasses import asdict

import click

from mb.commands.options import examples, json_option, keep_books, print_json
from mb.render.budgets import render_accounts


@click.command(epilog=examples("mb budget ls", "mb --tenant red budget ls --json"))
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the tenant's accounts, each below its parent, and the sandboxes that have limits: in use of what may be used."""
    accounts = keep_books(ctx, lambda books: books.list_accounts())
    if as_json:
        print_json([asdict(account) for account in accounts])
    else:
        click.echo("\n".join(render_accounts(accounts)))
