"""`mb host token`."""

import re
from dataclasses import asdict
from datetime import UTC, datetime

import click

from mb.commands.options import examples, json_option, operate, print_json

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_TTL = re.compile(r"([0-9]{1,6})([smhd])")

_EXAMPLES = examples("mb host token rack1-07 > rack1-07.token", "mb host token rack1-07 --ttl 15m --json")


def parse_ttl(_ctx: click.Context, _parameter: click.Parameter, text: str) -> int:
    """Seconds of "90s", "15m", "1h" or "2d"."""
    found = _TTL.fullmatch(text)
    if found is None:
        raise click.BadParameter(f"{text!r} is no time: write for example 15m, 1h or 2d")
    return int(found[1]) * _UNITS_S[found[2]]


@click.command(epilog=_EXAMPLES)
@click.argument("host_id", metavar="HOST")
@click.option("--ttl", "ttl_s", default="1h", callback=parse_ttl, help="How long it is good: 60s to 7d (1h).")
@json_option
@click.pass_context
def command(ctx: click.Context, host_id: str, *, ttl_s: int, as_json: bool) -> None:
    """Make a token with which one machine may join as HOST, once. For operators.

    Whoever has the token can become that host: hand it over as you would a password.
    """
    given = operate(ctx, lambda operator: operator.create_token(host_id, ttl_s))
    if as_json:
        print_json(asdict(given))
        return
    click.echo(given.token)
    end = datetime.fromtimestamp(given.expires_at_ms / 1000, UTC)
    click.echo(f"good once, until {end:%Y-%m-%d %H:%M} UTC; on {host_id}:", err=True)
    click.echo("  mb host enrol --token-file FILE --scheduler IP:PORT --out /etc/bedplate", err=True)
