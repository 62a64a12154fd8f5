"""`mb host doctor`."""

import os
import sys
from pathlib import Path

import click

from mb.commands.options import examples


@click.command(epilog=examples("mb host doctor", "mb host doctor --config hostd.toml --json"))
@click.option(
    "--config", default="/etc/bedplate/hostd.toml", type=click.Path(path_type=Path), help="hostd's TOML file."
)
@click.option("--json", "as_json", is_flag=True, help="Print a list of findings as JSON.")
def command(config: Path, *, as_json: bool) -> None:
    """On a host, as root: check everything that hostd needs, and say the next step for what is not right.

    Exits with 0 when nothing fails, with 1 when something does. Warnings do not count.
    """
    arguments = [sys.executable, "-m", "hostd.doctor", "--config", str(config), *(["--json"] if as_json else [])]
    sys.stdout.flush()
    # Programs do not import each other: this process becomes hostd's doctor.
    os.execv(sys.executable, arguments)  # noqa: S606 (a fixed program, no shell)
