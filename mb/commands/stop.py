"""`mb stop`."""

import click

from mb.commands.options import call, examples, json_option, name_argument, print_json
from mb.render.sandbox import to_json


@click.command(epilog=examples("mb stop fix-tests"))
@name_argument
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, as_json: bool) -> None:
    """End the VM of the sandbox NAME: its agents get TERM, later KILL; output and changes stay until mb destroy."""
    sandbox = call(ctx, lambda client: client.stop_sandbox(name))
    if as_json:
        print_json(to_json(sandbox))
    else:
        click.echo(f"{sandbox.spec.name} is asked to stop; mb status {sandbox.spec.name} shows when it has")
