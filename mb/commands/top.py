"""`mb top`."""

import asyncio
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mb.commands.options import call, examples, json_option, notify, print_json
from mb.render.usage import Use, measure, render_uses

if TYPE_CHECKING:
    from mb.client import Client

# Between two looks at a counter of milliseconds: long enough for a percentage to mean something.
MEASURED_S = 1.0


@click.command(epilog=examples("mb top", "mb top --json"))
@json_option
@click.pass_context
def command(ctx: click.Context, *, as_json: bool) -> None:
    """Show once what running sandboxes use: CPU over one second (100 is one core), memory, disk."""
    uses, unreached = call(ctx, _measure)
    if as_json:
        print_json({"uses": [asdict(use) for use in uses], "unreached_hosts": unreached})
    else:
        click.echo("\n".join(render_uses(uses, time.time_ns() // 1_000_000)))
    for host in unreached:
        notify(f"host {host} did not answer; its sandboxes are not listed")


async def _measure(client: "Client") -> tuple[list[Use], list[str]]:
    sandboxes = {sandbox.sandbox_id: sandbox for sandbox in await client.list_sandboxes()}
    before, _ = await client.live.read_usage()
    await asyncio.sleep(MEASURED_S)
    after, unreached = await client.live.read_usage()
    return measure(before, after, sandboxes), unreached
