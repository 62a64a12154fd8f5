"""What the verbs that run a program in a sandbox share."""

import sys
from typing import TYPE_CHECKING

import click

from mb.exits import Exit
from mb.program import USERS

if TYPE_CHECKING:
    from mb.client import Client
    from mb.program import Program

user_option = click.option(
    "--user", type=click.Choice(USERS), default=USERS[0], show_default=True, help="As whom in the sandbox."
)
env_option = click.option("--env", "-e", multiple=True, metavar="K[=V]", help="A variable; K alone: as it is here.")
workdir_option = click.option("--workdir", "-w", default="", help="Folder to start in; else the first agent's.")


async def run_program(client: "Client", program: "Program", *, reads_input: bool) -> int:
    """Runs it with this process's streams; the exit code that mb ends with."""
    from mb.console import report_end, run_here  # noqa: PLC0415 (imports gRPC)

    ended = await run_here(client, program, reads_input=reads_input)
    if ended is not None:
        return report_end(ended, Exit.OWN_ERROR)
    click.echo("mb: let go of the program; it is ended", err=True, file=sys.stderr)
    return Exit.INTERRUPTED
