"""`mb check`: a jcard's spec, or everything that is wrong with it. Offline."""

from dataclasses import asdict
from pathlib import Path

import click

from mb.commands.options import examples, json_option, print_json
from mb.prepare import prepared
from mb.render.spec import render_spec


@click.command(epilog=examples("mb check", "mb check agents/fix/jcard.toml", "mb check --json"))
@click.argument("path", type=click.Path(path_type=Path), default=".")
@json_option
def command(path: Path, as_json: bool) -> None:
    """Say what the jcard at PATH (a file or its folder; default: here) becomes.

    Asks nobody. Lists every fault, and exits with 2 when there is one.
    """
    with prepared(path) as found:
        if as_json:
            print_json({"file": str(found.path), "spec": asdict(found.spec), "notes": list(found.notes)})
        else:
            click.echo("\n".join(render_spec(found.spec, found.sources, found.notes)))
