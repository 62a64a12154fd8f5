"""`mb destroy`."""

from typing import TYPE_CHECKING

import click

from mb.commands.options import call, examples, json_option, name_argument, print_json
from mb.render.sandbox import to_json

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from mb.client import Client


@click.command(epilog=examples("mb destroy fix-tests", "mb destroy fix-tests --no-wait"))
@name_argument
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return once nothing of it is left.")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, *, wait: bool, as_json: bool) -> None:
    """Remove every trace of the sandbox NAME: VM, disks, output and changes."""

    async def destroy(client: "Client") -> "Sandbox":
        from mb.follow import wait_removed  # noqa: PLC0415 (imports gRPC)

        sandbox = await client.destroy_sandbox(name)
        if wait:
            await wait_removed(client, sandbox, lambda text: click.echo(text, err=True))
        return sandbox

    sandbox = call(ctx, destroy)
    if as_json:
        print_json(to_json(sandbox) | {"is_removed": wait})
    else:
        click.echo(f"{sandbox.spec.name} is removed" if wait else f"{sandbox.spec.name} is being removed")
