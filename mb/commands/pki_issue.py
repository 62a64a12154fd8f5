"""`mb pki issue`."""

import datetime
from pathlib import Path

import click

from mb.commands.options import examples, json_option, print_json

# The values of fleet.identity.Role, which is not imported for a help text; a test holds the two together.
ROLES = ("operator", "tenant", "host", "scheduler", "store")

_EXAMPLES = examples(
    "mb pki issue pki --role tenant lab",
    "mb pki issue pki --role scheduler scheduler --address 10.0.0.5",
    "mb pki issue pki --role host rack1-07 --address 10.0.0.17",
)


@click.command(epilog=_EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), required=True, help="What the certificate's holder may do.")
@click.option("--address", "addresses", multiple=True, help="An IP address it serves on; may be repeated.")
@click.option("--days", type=click.IntRange(1, 3650), default=365, help="How long it is good (365).")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@json_option
def command(
    folder: Path, name: str, role: str, *, addresses: tuple[str, ...], days: int, force: bool, as_json: bool
) -> None:
    """Issue a certificate for NAME, signed by the authority in FOLDER, as NAME.crt and NAME.key there."""
    from fleet.certificates import issue_certificate  # noqa: PLC0415 (imports cryptography)
    from fleet.identity import Identity, Role  # noqa: PLC0415 (imports cryptography)
    from mb.pki import check_addresses, check_name, load_authority, write_pair  # noqa: PLC0415

    check_addresses(addresses)
    check_name(name)
    authority = load_authority(folder)
    now, lifetime = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=days)
    pair = issue_certificate(authority, Identity(Role(role), name), now, addresses, lifetime)
    files = write_pair(folder, name, pair, force=force)
    if as_json:
        print_json({"certificate": str(files[0]), "key": str(files[1]), "role": role, "name": name})
    else:
        click.echo(f"wrote {files[0]} and {files[1]}")
