"""`mb attach`."""

import os
import sys
from typing import TYPE_CHECKING

import click

from fleet.errors import ConflictError
from mb.commands.options import agent_argument, call, examples, find_agent, name_argument, notify
from mb.commands.programs import run_program
from mb.exits import Exit
from mb.program import Program
from mb.render.output import OutputPrinter
from mb.terminal import is_terminal, terminal_size

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from mb.client import Client

# Where guestd keeps the agents' terminals (docs/guest-link.md).
TMUX_SOCKET = "/run/bedplate/tmux"

_EXAMPLES = examples(
    "mb attach fix-tests            its only agent",
    "mb attach fix-tests fixer      Ctrl-B D leaves; the agent goes on",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@agent_argument
@click.pass_context
def command(ctx: click.Context, name: str, agent: str) -> None:
    """Join the terminal of AGENT in the sandbox NAME: see what it shows, type into it.

    An agent without a session has no terminal: its output is followed, read-only. mb's own errors exit with 125.
    """
    ctx.exit(call(ctx, lambda client: _attach(client, name, agent)))


async def _attach(client: "Client", name: str, agent: str) -> int:
    sandbox = await client.get_sandbox(name)
    wanted = find_agent(sandbox, agent)
    if not wanted.session:
        return await _follow(client, sandbox, wanted.name)
    if not (is_terminal(0) and is_terminal(1)):
        next_step = f"run it from a terminal, or read along with mb logs {sandbox.spec.name} {wanted.name} --follow"
        raise ConflictError("no_terminal", "attaching needs a terminal here", next_step)
    command = ("tmux", "-S", TMUX_SOCKET, "attach-session", "-t", f"={wanted.session}")
    program = Program(sandbox.sandbox_id, command, terminal=terminal_size(), term=os.environ.get("TERM", ""))
    return await run_program(client, program, reads_input=True)


async def _follow(client: "Client", sandbox: "Sandbox", agent: str) -> int:
    from mb.live import OutputRange  # noqa: PLC0415 (imports gRPC)
    from mb.resume import read_output  # noqa: PLC0415

    notify(f"{agent} has no session, so its output follows, read-only; session in its jcard gives it a terminal")
    printer = OutputPrinter(sys.stdout, prefix=False)
    async for chunk in read_output(client, sandbox.sandbox_id, agent, OutputRange(), follow=True, notify=notify):
        printer.write(agent, chunk.payload)
    return Exit.OK
