"""`mb budget rm`."""

import click

from mb.commands.options import examples, keep_books


@click.command(epilog=examples("mb budget rm research"))
@click.argument("account")
@click.pass_context
def command(ctx: click.Context, account: str) -> None:
    """Remove ACCOUNT. Nothing may count in it; what it has used stays with the accounts above it."""
    keep_books(ctx, lambda books: books.remove_account(account))
    click.echo(f"account {account} is removed")
