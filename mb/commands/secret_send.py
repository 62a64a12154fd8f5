"""`mb secret send`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mb.commands.options import call, examples, json_option, name_argument, notify, print_json

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from mb.client import Client


@click.command(epilog=examples("mb secret send fix-tests", "mb secret send fix-tests agents/fix"))
@name_argument
@click.argument("path", type=click.Path(path_type=Path), default=".")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, path: Path, *, as_json: bool) -> None:
    """Send the sandbox NAME the values of its secrets from the jcard at PATH (a file or its folder; default: here).

    For one whose status says secrets_awaited after mb up has let go of it. Only names are ever shown.
    """
    sandbox = call(ctx, lambda client: _send(client, name, path))
    if as_json:
        print_json({"sandbox_id": sandbox.sandbox_id, "sent": list(sandbox.spec.secrets)})
    elif not sandbox.spec.secrets:
        click.echo(f"{sandbox.spec.name} has no secrets", err=True)


async def _send(client: "Client", name: str, path: Path) -> "Sandbox":
    from mb.secrets import load_values, send_secrets  # noqa: PLC0415 (imports gRPC)

    sandbox = await client.get_sandbox(name)
    values = load_values(path, sandbox)
    if values:
        await send_secrets(client, sandbox, values, notify, is_wanted=True)
    return sandbox
