"""`mb logs`."""

import sys
from typing import TYPE_CHECKING

import click

from mb.commands.options import call, examples, json_option, name_argument, print_json
from mb.render.output import OutputPrinter

if TYPE_CHECKING:
    from mb.client import Client

_EXAMPLES = examples(
    "mb logs fix-tests                   what its only agent has printed so far",
    "mb logs fix-tests fixer --follow    and what it prints until it ends",
    "mb logs fix-tests --offset 4096     from that byte on",
    "mb logs fix-tests > output          the exact bytes",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@click.argument("agent", default="")
@click.option("--follow", "-f", is_flag=True, help="Go on until the agent has ended.")
@click.option("--offset", type=click.IntRange(min=0), default=0, show_default=True, help="First byte to print.")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, agent: str, *, follow: bool, offset: int, as_json: bool) -> None:
    """Print the output of AGENT in the sandbox NAME; AGENT may be left out when there is only one.

    On a terminal, characters that could steer it are written out. With --json: one object, with the bytes decoded as UTF-8.
    """
    if as_json and follow:
        raise click.UsageError("--json and --follow exclude each other")
    printer = OutputPrinter(sys.stdout, prefix=False)
    pieces: list[bytes] = []
    take = pieces.append if as_json else lambda payload: printer.write(agent, payload)

    async def read(client: "Client") -> None:
        from mb.resume import read_output  # noqa: PLC0415 (imports gRPC)

        async for payload in read_output(client, name, agent, offset, follow=follow, notify=_notify):
            take(payload)

    call(ctx, read)
    if as_json:
        content = b"".join(pieces)
        text = content.decode("utf-8", "replace")
        print_json({"agent": agent, "offset": offset, "next_offset": offset + len(content), "text": text})


def _notify(text: str) -> None:
    click.echo(text, err=True)
