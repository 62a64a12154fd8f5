"""`mb host enrol`."""

from pathlib import Path

import click

from mb.commands.options import examples, json_option, print_json

_EXAMPLES = examples(
    "mb host enrol --token-file rack1-07.token \\",
    "    --scheduler 10.0.0.5:7444 --out /etc/bedplate",
    "ssh ops mb host token rack1-07 | mb host enrol --token-file - \\",
    "    --scheduler 10.0.0.5:7444 --out /etc/bedplate",
)


@click.command(epilog=_EXAMPLES)
@click.option("--token-file", required=True, metavar="FILE", help="Where the token is; - reads it from stdin.")
@click.option("--scheduler", required=True, metavar="IP:PORT", help="A scheduler's enrolment listener.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The folder for ca.crt, host.crt, host.key."
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@json_option
def command(token_file: str, *, scheduler: str, out: Path, force: bool, as_json: bool) -> None:
    """Get this machine's certificate as a host, for a token of mb host token. Needs no configuration.

    The key is made here and never leaves. The scheduler must prove the authority that the token names.
    """
    from mb.enrol import enrol, read_token  # noqa: PLC0415 (imports gRPC)

    token = read_token(token_file)
    files = enrol(token, scheduler, out, force=force)
    if as_json:
        print_json(
            {
                "host_id": token.host_id,
                "ca": str(files.ca),
                "certificate": str(files.certificate),
                "key": str(files.key),
            }
        )
        return
    click.echo(f"this machine is host {token.host_id}; in /etc/bedplate/hostd.toml:")
    click.echo(f'  host_id = "{token.host_id}"\n\n  [tls]\n  ca = "{files.ca}"')
    click.echo(f'  certificate = "{files.certificate}"\n  key = "{files.key}"')
    click.echo("next: mb host doctor, then start hostd")
