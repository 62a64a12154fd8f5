"""`mb host revoke`."""

import click

from mb.commands.options import examples, json_option, operate, print_json


@click.command(epilog=examples("mb host revoke rack1-07", 'mb host revoke rack1-07 --reason "stolen from the rack"'))
@click.argument("host_id", metavar="HOST")
@click.option("--reason", default="", help="Why, in one line.")
@json_option
@click.pass_context
def command(ctx: click.Context, host_id: str, *, reason: str, as_json: bool) -> None:
    """Refuse every certificate that HOST has now, void its tokens, and cordon it. For operators.

    Schedulers and hosts refuse its calls within seconds, and end those under way. etcd reads a list of its own: what is
    printed is to be added to it. A certificate that is issued later lets the host in again; mb host uncordon then.
    """
    serials = operate(ctx, lambda operator: operator.revoke_host(host_id, reason))
    if as_json:
        print_json({"host_id": host_id, "serials": serials})
        return
    click.echo(f"every certificate of {host_id} is refused, and it is cordoned")
    for serial in serials:
        click.echo(f"for etcd: mb pki revoke FOLDER --serial {serial}")
    click.echo(f"for etcd, if mb pki has issued one: mb pki revoke FOLDER {host_id}")
