"""`mb host drain`."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mb.commands.options import examples, json_option, operate, print_json
from mb.render.hosts import render_drain

if TYPE_CHECKING:
    from fleet.model.host import Drain
    from mb.operator import Operator

# A sandbox takes seconds to stop: looking more often shows nothing more.
LOOK_INTERVAL_S = 1.0
MOVES_MAX = 100


@click.command(
    epilog=examples(
        "mb host drain rack1-07 --wait",
        'mb host drain rack1-07 --moves 4 --reason "new disks"',
        "mb host drain rack1-07 --force --wait --json",
    )
)
@click.argument("host_id", metavar="HOST")
@click.option("--moves", default=1, type=click.IntRange(1, MOVES_MAX), metavar="N", help="So many at a time (1).")
@click.option("--force", "is_forced", is_flag=True, help="Also stop what cannot run on elsewhere.")
@click.option("--wait", "waits", is_flag=True, help="Return when nothing runs there any more.")
@click.option("--reason", default="", help="Why, in one line: mb host ls shows it.")
@json_option
@click.pass_context
def command(
    ctx: click.Context, host_id: str, *, moves: int, is_forced: bool, waits: bool, reason: str, as_json: bool
) -> None:
    """Cordon HOST, and move what runs there to other hosts. For operators.

    A sandbox is stopped, with its agents' grace period, and begins anew from its source on another host. One whose agents have
    begun and do not restart is waited for; with --force it is stopped, and its disk stays. mb host uncordon ends the drain.
    """

    async def drain(operator: "Operator") -> "Drain":
        found = await operator.drain_host(host_id, reason, moves=moves, is_forced=is_forced)
        return await _follow(operator, found, None if as_json else click.echo) if waits else found

    found = operate(ctx, drain)
    if as_json:
        print_json(asdict(found))
    elif not waits:
        click.echo("\n".join(render_drain(found)))


async def _follow(operator: "Operator", found: "Drain", say: Callable[[str], None] | None) -> "Drain":
    """Looks until nothing is left, and says what has changed."""
    host_id, total, said = found.host.record.host_id, found.left + found.moving, ""
    while True:
        told = "\n".join(render_drain(found, total))
        if say is not None and told != said:
            say(told)
        said = told
        if not found.left and not found.moving:
            return found
        await asyncio.sleep(LOOK_INTERVAL_S)
        found = await operator.get_drain(host_id)
        total = max(total, found.left + found.moving)
