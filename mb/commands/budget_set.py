"""`mb budget set`."""

from dataclasses import asdict

import click

from mb.commands.options import examples, json_option, keep_books, print_json
from mb.limits import parse_limits
from mb.render.budgets import render_account


@click.command(
    epilog=examples(
        "mb budget set research --parent science --vcpus 64 --memory 256GiB",
        "mb budget set research --vcpu-time 500h --cost 120.50",
        "mb --tenant red budget set --gpus 8     the tenant's own, for operators",
        "mb budget set research --vcpus none     no limit of vCPUs any more",
    )
)
@click.argument("account", default="")
@click.option("--parent", default="", help="Below which account a new one lies.")
@click.option("--vcpus", help="At once.")
@click.option("--memory", help="At once, such as 64GiB.")
@click.option("--disk", help="At once, such as 1TiB.")
@click.option("--gpus", help="Devices at once; 0.5 is half a one.")
@click.option("--sandboxes", help="At once.")
@click.option("--depth", help="Generations of sandboxes below one another.")
@click.option("--wall-clock", help="In total, such as 100h, of all sandboxes together.")
@click.option("--vcpu-time", help="In total: vCPUs times how long.")
@click.option("--gpu-time", help="In total: devices times how long.")
@click.option("--egress", help="In total, such as 10GiB.")
@click.option("--cost", help="In total, in the operator's currency.")
@json_option
@click.pass_context
def command(ctx: click.Context, /, account: str, parent: str, *, as_json: bool, **limits: str | None) -> None:
    """Set limits of ACCOUNT (default: the tenant's own, which operators set), and make it where it is new.

    What is not named stays as it is; `none` lifts a limit. A limit counts for the account with all below it.
    """
    changes = parse_limits({name: value for name, value in limits.items() if value is not None})
    found = keep_books(ctx, lambda books: books.change_account(account, parent, changes))
    if as_json:
        print_json(asdict(found))
    else:
        click.echo("\n".join(render_account(found)))
