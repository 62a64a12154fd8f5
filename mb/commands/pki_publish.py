"""`mb pki publish`."""

from pathlib import Path

import click

from mb.commands.options import examples, json_option, operate, print_json


@click.command(epilog=examples("mb pki publish pki"))
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
@click.pass_context
def command(ctx: click.Context, folder: Path, *, as_json: bool) -> None:
    """Tell the fleet what ca.crl in FOLDER withdraws: schedulers and hosts refuse it within seconds. For operators.

    Needs ca.crl only, never the authority's key.
    """
    from mb.pki import load_list  # noqa: PLC0415 (imports cryptography)

    crl = load_list(folder)
    added, known = operate(ctx, lambda operator: operator.publish_revocations(crl))
    if as_json:
        print_json({"added": added, "known": known})
    else:
        click.echo(f"{added} newly refused, {known} refused before")
