"""`mb budget rm`."""

import click

from mb.commands.options import examples, json_option, keep_books, print_json


@click.command(epilog=examples("mb budget rm research", "mb budget rm research --json"))
@click.argument("account")
@json_option
@click.pass_context
def command(ctx: click.Context, account: str, as_json: bool) -> None:
    """Remove ACCOUNT. Nothing may count in it; what it has used stays with the accounts above it."""
    keep_books(ctx, lambda books: books.remove_account(account))
    if as_json:
        print_json({"account": account})
    else:
        click.echo(f"account {account} is removed")
