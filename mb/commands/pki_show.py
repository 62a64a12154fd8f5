"""`mb pki show`."""

from pathlib import Path

import click

from mb.commands.options import examples, json_option, print_json


@click.command(epilog=examples("mb pki show pki/lab.crt", "mb pki show --json pki/lab.crt"))
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def command(file: Path, as_json: bool) -> None:
    """Show what the certificate in FILE says: whose it is, for what, where and how long. It is not verified."""
    from mb.pki import describe_certificate  # noqa: PLC0415 (imports cryptography)
    from mb.render.text import wrap  # noqa: PLC0415

    described = describe_certificate(file)
    if as_json:
        print_json(described)
        return
    for label, value in described.items():
        for line in wrap(label, ", ".join(value) if isinstance(value, list) else str(value)):
            click.echo(line)
