"""`mb host token`."""

from dataclasses import asdict
from datetime import UTC, datetime

import click

from mb.commands.options import examples, json_option, operate, print_json
from mb.moments import parse_span_s

_EXAMPLES = examples("mb host token rack1-07 > rack1-07.token", "mb host token rack1-07 --ttl 15m --json")


@click.command(epilog=_EXAMPLES)
@click.argument("host_id", metavar="HOST")
@click.option("--ttl", default="1h", metavar="SPAN", help="How long it is good: 60s to 7d (1h).")
@json_option
@click.pass_context
def command(ctx: click.Context, host_id: str, *, ttl: str, as_json: bool) -> None:
    """Make a token with which one machine may join as HOST, once. For operators.

    Whoever has the token can become that host: hand it over as you would a password.
    """
    ttl_s = round(parse_span_s(ttl, "--ttl"))
    given = operate(ctx, lambda operator: operator.create_token(host_id, ttl_s))
    if as_json:
        print_json(asdict(given))
        return
    click.echo(given.token)
    end = datetime.fromtimestamp(given.expires_at_ms / 1000, UTC)
    click.echo(f"good once, until {end:%Y-%m-%d %H:%M} UTC; on {host_id}:", err=True)
    click.echo("  mb host enrol --token-file FILE --scheduler IP:PORT --out /etc/bedplate", err=True)
