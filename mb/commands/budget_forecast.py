"""`mb budget forecast`."""

from dataclasses import asdict

import click

from mb.commands.options import examples, json_option, keep_books, print_json
from mb.render.budgets import render_forecast


@click.command(epilog=examples("mb budget forecast", "mb budget forecast research --json"))
@click.argument("account", default=None, required=False)
@json_option
@click.pass_context
def command(ctx: click.Context, account: str | None, as_json: bool) -> None:
    """Show when what runs out, if all goes on as it runs now: of ACCOUNT, or of every account; the soonest first."""
    accounts = keep_books(ctx, lambda books: books.list_accounts(account))
    if as_json:
        print_json(
            [{"account": one.account, "shortages": [asdict(each) for each in one.shortages]} for one in accounts]
        )
    else:
        click.echo("\n".join(render_forecast(accounts)))
