"""`mb explain`."""

from dataclasses import asdict

import click

from mb.commands.options import call, examples, json_option, name_argument, print_json
from mb.exits import Exit
from mb.render.explanation import is_same, render_explanation

_EXAMPLES = examples(
    "mb explain fix-tests               as things are now",
    "mb explain fix-tests --recompute   as they were; decided again, compared",
    "mb explain fix-tests --json",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@click.option("--recompute", is_flag=True, help="Make the decision again from its record; exit 1 if it is another.")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, *, recompute: bool, as_json: bool) -> None:
    """Show why the sandbox NAME is on its host, or why it waits and what would make it fit.

    The best hosts with every term of their scores, and what excludes the others. Other hosts' names are for operators.
    """
    told = call(ctx, lambda client: client.live.explain(name, is_recomputed=recompute))
    if as_json:
        print_json(asdict(told))
    else:
        click.echo("\n".join(render_explanation(told)))
    if recompute and not is_same(told):
        ctx.exit(Exit.ERROR)
