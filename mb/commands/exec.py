"""`mb exec`."""

import os

import click

from mb.commands.options import call, examples, name_argument
from mb.commands.programs import env_option, run_program, user_option, workdir_option
from mb.program import Program, parse_env
from mb.terminal import is_terminal, terminal_size

_EXAMPLES = examples(
    "mb exec fix-tests -- git status",
    "mb exec fix-tests -it -- python3        on a terminal",
    "mb exec fix-tests -- sh -c 'cat > a' < a   input is passed on",
    "mb exec fix-tests --user root -- dmesg",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@click.argument("command", nargs=-1, required=True, metavar="-- COMMAND...")
@click.option("--interactive", "-i", is_flag=True, help="Pass input on, from a keyboard too; pipes always are.")
@click.option("--tty", "-t", "tty", is_flag=True, help="Give it a terminal: this one.")
@user_option
@env_option
@workdir_option
@click.pass_context
def command(
    ctx: click.Context,
    name: str,
    command: tuple[str, ...],
    *,
    interactive: bool,
    tty: bool,
    user: str,
    env: tuple[str, ...],
    workdir: str,
) -> None:
    """Run COMMAND in the running sandbox NAME and exit as it does.

    Its output is stdout and stderr, apart unless it has a terminal. Signals are passed on. At the third Ctrl-C mb lets go of
    it, and of a terminal when Enter ~ . is typed: that ends it. mb's own errors exit with 125; a signal that ended the program
    with 128 and its number.
    """
    size = terminal_size() if tty else None
    program = Program(
        name, command, workdir, parse_env(env, os.environ), user, size, os.environ.get("TERM", "") if tty else ""
    )
    reads_input = interactive or not is_terminal(0)
    ctx.exit(call(ctx, lambda client: run_program(client, program, reads_input=reads_input)))
