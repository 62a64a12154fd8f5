"""`mb destroy`, and `mb rm`, which is the same."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from fleet.errors import BedplateError
from mb.commands.options import call, examples, json_option, names_argument, notify, print_json
from mb.render.sandbox import to_json

if TYPE_CHECKING:
    from mb.client import Client

wait_option = click.option("--wait/--no-wait", default=True, show_default=True, help="Return once nothing is left.")


@click.command(epilog=examples("mb destroy fix-tests", "mb rm one two", "mb rm fix-tests --no-wait"))
@names_argument
@wait_option
@json_option
@click.pass_context
def command(ctx: click.Context, names: tuple[str, ...], *, wait: bool, as_json: bool) -> None:
    """Remove every trace of the sandboxes NAME...: VM, disks, output and changes."""
    destroy_all(ctx, names, wait=wait, as_json=as_json)


def destroy_all(ctx: click.Context, names: Sequence[str], *, wait: bool, as_json: bool) -> None:
    """Destroys each of the sandboxes, prints what came of it, and raises the first error when all were tried."""
    shown, errors = call(ctx, lambda client: _destroy_all(client, names, wait=wait))
    if as_json:
        print_json(shown)
    for one in () if as_json else shown:
        click.echo(f"{one['spec']['name']} is {'removed' if wait else 'being removed'}")
    for error in errors[1:]:
        notify(f"error: {error.message}")
    if errors:
        raise errors[0]


async def _destroy_all(
    client: "Client", names: Sequence[str], *, wait: bool
) -> tuple[list[dict[str, Any]], list[BedplateError]]:
    from mb.follow import wait_removed  # noqa: PLC0415 (imports gRPC)

    asked, errors = [], []
    for name in dict.fromkeys(names):
        try:
            asked.append(await client.destroy_sandbox(name))
        except BedplateError as error:
            errors.append(error)
    for sandbox in asked if wait else ():
        await wait_removed(client, sandbox, notify)
    return [to_json(sandbox) | {"is_removed": wait} for sandbox in asked], errors
