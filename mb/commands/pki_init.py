"""`mb pki init`."""

import datetime
from pathlib import Path

import click

from mb.commands.options import examples, json_option, print_json


@click.command(epilog=examples("mb pki init /etc/bedplate/pki"))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace an authority that is there: its certificates become worthless.")
@json_option
def command(folder: Path, *, force: bool, as_json: bool) -> None:
    """Make the authority of a new fleet in FOLDER: ca.crt, and ca.key, which only operators may ever see."""
    from fleet.certificates import create_authority  # noqa: PLC0415 (imports cryptography)
    from mb.pki import AUTHORITY, write_pair  # noqa: PLC0415

    files = write_pair(folder, AUTHORITY, create_authority(datetime.datetime.now(datetime.UTC)), force=force)
    if as_json:
        print_json({"certificate": str(files[0]), "key": str(files[1])})
    else:
        click.echo(f"wrote {files[0]} and {files[1]}; next: mb pki issue {folder} --role operator NAME")
