"""`mb stop`."""

import click

from fleet.model.sandbox import ENDED_PHASES, Goal
from mb.commands.options import call, examples, json_option, name_argument, print_json
from mb.render.sandbox import to_json


@click.command(epilog=examples("mb stop fix-tests     mb start runs it again, on the disk it has"))
@name_argument
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, as_json: bool) -> None:
    """End the VM of the sandbox NAME: its agents get TERM, later KILL; disk, output and changes stay until mb destroy.

    A sandbox that has ended already is left as it is.
    """
    sandbox = call(ctx, lambda client: client.stop_sandbox(name))
    if as_json:
        print_json(to_json(sandbox))
    elif sandbox.phase in ENDED_PHASES and sandbox.goal is not Goal.REMOVE:
        click.echo(f"{sandbox.spec.name} has ended already ({sandbox.phase}); nothing changes")
    else:
        click.echo(f"{sandbox.spec.name} is asked to stop; mb status {sandbox.spec.name} shows when it has")
