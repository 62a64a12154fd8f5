"""`mb events`."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mb.commands.options import call, examples, json_option, notify, optional_name_argument, print_json, print_json_line
from mb.moments import parse_since_ms
from mb.render.event import render_event

if TYPE_CHECKING:
    from fleet.model.event import Event
    from mb.client import Client

_EXAMPLES = examples(
    "mb events                        every sandbox's, so far",
    "mb events fix-tests --since 1h",
    "mb events --follow --json        one object a line, as they come",
)


@click.command(epilog=_EXAMPLES)
@optional_name_argument
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now on.")
@click.option("--since", default="", metavar="WHEN", help="Not before: 10m (ago), or RFC 3339.")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, *, follow: bool, since: str, as_json: bool) -> None:
    """Show what happened to the sandbox NAME, or to all: when, by whom and why, with the state before and after.

    With --follow it goes on until the sandbox NAME is removed. With --json: a list; with --follow one object a line.
    """
    since_ms = parse_since_ms(since, time.time_ns() // 1_000_000) if since else 0
    held: list[Event] = []
    is_silent = True

    def show(event: "Event") -> None:
        nonlocal is_silent
        is_silent = False
        if as_json and follow:
            print_json_line(asdict(event))
        elif as_json:
            held.append(event)
        else:
            click.echo("\n".join(render_event(event)))

    async def read(client: "Client") -> None:
        from mb.resume import read_events  # noqa: PLC0415 (imports gRPC)

        async for event in read_events(client, name, since_ms, follow=follow, notify=notify):
            show(event)

    call(ctx, read)
    if as_json and not follow:
        print_json([asdict(event) for event in held])
    elif is_silent and not follow:
        click.echo("no events" + (f" since {since}" if since else ""))
