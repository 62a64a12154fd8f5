"""`mb network log`."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mb.commands.options import call, examples, json_option, name_argument, notify, print_json, print_json_line
from mb.moments import parse_since_ms
from mb.render.network import render_network_event

if TYPE_CHECKING:
    from fleet.model.egress import NetworkEvent
    from mb.client import Client

_EXAMPLES = examples(
    "mb network log fix-tests",
    "mb network log fix-tests --denied --since 10m",
    "mb network log fix-tests --follow --json   one object a line, as they come",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, until the sandbox is removed.")
@click.option("--denied", is_flag=True, help="Only what was denied.")
@click.option("--since", default="", metavar="WHEN", help="Not before: 10m (ago), or RFC 3339.")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, *, follow: bool, denied: bool, since: str, as_json: bool) -> None:
    """Show what the sandbox NAME sent and its host let through or denied: as the host saw it, outside the guest.

    Alike frames that the packet filter dropped within some seconds are one line with their number. The host keeps
    the newest, some 8,000 lines, for as long as the sandbox is there. With --json: a list; with --follow one object
    a line.
    """
    since_ms = parse_since_ms(since, time.time_ns() // 1_000_000) if since else 0
    held: list[NetworkEvent] = []
    is_silent = True

    def show(event: "NetworkEvent") -> None:
        nonlocal is_silent
        is_silent = False
        if as_json and follow:
            print_json_line(asdict(event))
        elif as_json:
            held.append(event)
        else:
            click.echo("\n".join(render_network_event(event)))

    async def read(client: "Client") -> None:
        from mb.resume import read_network  # noqa: PLC0415 (imports gRPC)

        async for event in read_network(client, name, since_ms, follow=follow, denied=denied, notify=notify):
            show(event)

    call(ctx, read)
    if as_json and not follow:
        print_json([asdict(event) for event in held])
    elif is_silent and not follow:
        what = "nothing was denied" if denied else "nothing left it, and nothing was denied"
        click.echo(what + (f" since {since}" if since else ""))
