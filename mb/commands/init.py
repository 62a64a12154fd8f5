"""`mb init`: a jcard to start from."""

from pathlib import Path

import click

from fleet.errors import ConflictError, HostFaultError
from mb.commands.options import examples, json_option, print_json

_JCARD = """\
# What a sandbox is made of. `mb check` says what this becomes, `mb up` runs it.
# Every field: docs/jcard.md

{name}mixtape = "base:latest"        # the image: Debian with Python 3 and git

[resources]
cpus = 2
memory = "2GiB"
disk = "4GiB"

[network]
mode = "closed"                # nothing leaves the sandbox, nothing reaches it

[[shared]]
host = "."                     # this folder, without what .bedplateignore lists
guest = "/workspace"           # agents change a copy: see mb diff and mb get

[agent]
harness = "custom"
command = "python3 -m unittest -v"    # a shell line, or a list of words
timeout = "10m"                # then TERM, and KILL after grace_period
# grace_period = "30s"
# restart = "on-failure"       # or "always"; max_restarts = 3 bounds it
# memory = "1GiB"              # of the sandbox's; pid_limit = 512
# env = {{ LANG = "${{LANG}}" }}   # nothing else of yours passes
# session = "main"             # a terminal to watch and type in: mb attach
# replicas = 3                 # copies: custom-0, custom-1, custom-2

# Instead of a command, a known program with a prompt (or prompt_file):
# harness = "claude-code"      # or opencode, gemini-cli, codex
# prompt = "Mend the failing test."

# [secrets]                    # files in the guest's memory, never on a disk
# ANTHROPIC_API_KEY = "${{ANTHROPIC_API_KEY}}"
"""


@click.command(epilog=examples("mb init", "mb init agents/fix"))
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@json_option
def command(folder: Path, as_json: bool) -> None:
    """Write a commented jcard.toml into FOLDER (made if need be; default: here)."""
    from mb.jcard.parse import to_label  # noqa: PLC0415 (only this verb needs it here)

    path = folder / "jcard.toml"
    name = "" if to_label(folder.absolute().name) else 'name = "sandbox"\n'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            stream.write(_JCARD.format(name=name))
    except FileExistsError as error:
        raise ConflictError("jcard_exists", f"{path} is there already", "edit it, or name another folder") from error
    except OSError as error:
        raise HostFaultError("jcard_unwritable", f"{path}: {error.strerror}", "name a writable folder") from error
    if as_json:
        print_json({"path": str(path)})
    else:
        where = "" if folder == Path() else f" {folder}"
        click.echo(f"wrote {path}; next: mb check{where}, then mb up{where}")
