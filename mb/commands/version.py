"""`mb version`."""

import importlib.metadata
import platform

import click

from mb.commands.options import examples, json_option, print_json


@click.command(epilog=examples("mb version", "mb version --json"))
@json_option
def command(as_json: bool) -> None:
    """Print mb's version."""
    version = importlib.metadata.version("bedplate")
    if as_json:
        print_json({"version": version, "python": platform.python_version()})
    else:
        click.echo(f"mb {version}")
