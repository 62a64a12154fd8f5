"""`mb stop`."""

from typing import TYPE_CHECKING

import click

from fleet.model.sandbox import ENDED_PHASES, Goal, Phase
from mb.commands.options import call, examples, json_option, name_argument, notify, print_json
from mb.render.sandbox import to_json

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from mb.client import Client

_EXAMPLES = examples(
    "mb stop fix-tests           mb start runs it again, on the disk it has",
    "mb stop fix-tests --wait && mb start fix-tests",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@click.option("--wait/--no-wait", default=False, show_default=True, help="Return once it has stopped.")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, *, wait: bool, as_json: bool) -> None:
    """End the VM of the sandbox NAME: its agents get TERM, later KILL; disk, output and changes stay until mb destroy.

    A sandbox that has ended already is left as it is.
    """
    asked, sandbox = call(ctx, lambda client: _stop(client, name, wait=wait))
    if as_json:
        print_json(to_json(sandbox))
    elif asked.phase is Phase.STOPPED and not asked.host_id:
        click.echo(f"{asked.spec.name} is stopped; it had no host yet")
    elif asked.phase in ENDED_PHASES and asked.goal is not Goal.REMOVE:
        click.echo(f"{asked.spec.name} has ended already ({asked.phase}); nothing changes")
    elif wait:
        click.echo(f"{sandbox.spec.name} is {sandbox.phase}")
    else:
        click.echo(f"{asked.spec.name} is asked to stop; mb status {asked.spec.name} shows when it has")


async def _stop(client: "Client", name: str, *, wait: bool) -> "tuple[Sandbox, Sandbox]":
    """The sandbox as it was asked to stop, and as it is then."""
    from mb.follow import wait_stopped  # noqa: PLC0415 (imports gRPC)

    asked = await client.stop_sandbox(name)
    return asked, await wait_stopped(client, asked, notify) if wait else asked
