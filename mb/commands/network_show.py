"""`mb network show`."""

from dataclasses import asdict

import click

from fleet.model.policy import parse_policy
from mb.commands.options import call, examples, json_option, name_argument, print_json
from mb.render.network import render_policy


@click.command(epilog=examples("mb network show fix-tests", "mb network show fix-tests --json"))
@name_argument
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, *, as_json: bool) -> None:
    """Show what the sandbox NAME may reach: its mode, and the policy's digest, the same for the same policy."""
    sandbox = call(ctx, lambda client: client.get_sandbox(name))
    digest = parse_policy(sandbox.spec.network, sandbox.spec.routes).digest
    if as_json:
        print_json({"sandbox_id": sandbox.sandbox_id, **asdict(sandbox.spec.network), "digest": digest})
        return
    click.echo("\n".join(render_policy(sandbox.spec.network, digest)))
