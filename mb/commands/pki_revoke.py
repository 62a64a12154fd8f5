"""`mb pki revoke`."""

import datetime
from pathlib import Path

import click

from mb.commands.options import examples, json_option, print_json


@click.command(epilog=examples("mb pki revoke pki lab", "mb pki revoke pki --serial 3fa9c1"))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name", required=False)
@click.option("--serial", help="Its serial in hex, for a certificate that is not in FOLDER.")
@json_option
def command(folder: Path, name: str | None, *, serial: str | None, as_json: bool) -> None:
    """Withdraw the certificate NAME.crt in FOLDER, or the one with --serial: it is added to ca.crl there.

    Schedulers and hosts learn of it by mb pki publish, etcd by its --client-crl-file.
    """
    from mb.pki import CRL, parse_serial, revoke, serial_in  # noqa: PLC0415 (imports cryptography)

    if (name is None) == (serial is None):
        raise click.UsageError("name a certificate in FOLDER, or its --serial")
    number = parse_serial(serial) if serial is not None else serial_in(folder, str(name))
    count = revoke(folder, number, datetime.datetime.now(datetime.UTC))
    if as_json:
        print_json({"serial": f"{number:x}", "crl": str(folder / CRL), "entries": count})
    else:
        click.echo(f"{number:x} is in {folder / CRL}\n  next: mb pki publish {folder}")
