"""`mb completion`."""

import click

from mb.commands.options import examples

_EXAMPLES = examples(
    "mb completion bash > /etc/bash_completion.d/mb",
    "mb completion zsh > ~/.zfunc/_mb         a folder of your fpath",
    "mb completion fish > ~/.config/fish/completions/mb.fish",
)


@click.command(epilog=_EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete mb's verbs and options, and the names of sandboxes and agents."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415 (only this verb needs it)

    kind = get_completion_class(shell)
    assert kind is not None
    completer = kind(ctx.find_root().command, {}, "mb", "_MB_COMPLETE")
    # Not source(): it also asks the bash of this machine for its version.
    click.echo(completer.source_template % completer.source_vars())
