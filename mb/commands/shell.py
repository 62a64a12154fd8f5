"""`mb shell`."""

import os

import click

from mb.commands.options import call, examples, name_argument
from mb.commands.programs import env_option, run_program, user_option, workdir_option
from mb.program import Program, parse_env
from mb.terminal import is_terminal, terminal_size

# A login shell: bash where the image has it.
LOGIN_SHELL = ("/bin/sh", "-c", "if command -v bash >/dev/null 2>&1; then exec bash -l; else exec sh -l; fi")

_EXAMPLES = examples(
    "mb shell fix-tests",
    "mb shell fix-tests --user root",
    "mb shell fix-tests < script.sh   without a terminal",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@user_option
@env_option
@workdir_option
@click.pass_context
def command(ctx: click.Context, name: str, *, user: str, env: tuple[str, ...], workdir: str) -> None:
    """Open a login shell in the running sandbox NAME.

    On this terminal, when there is one: then Enter ~ . lets go of a shell that no longer answers. Exit codes are those of mb exec.
    """
    has_terminal = is_terminal(0) and is_terminal(1)
    size, term = (terminal_size(), os.environ.get("TERM", "")) if has_terminal else (None, "")
    program = Program(name, LOGIN_SHELL, workdir, parse_env(env, os.environ), user, size, term)
    ctx.exit(call(ctx, lambda client: run_program(client, program, reads_input=True)))
