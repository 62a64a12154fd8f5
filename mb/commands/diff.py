"""`mb diff`."""

import asyncio
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from fleet.errors import HostFaultError
from mb.commands.options import call, examples, json_option, name_argument, print_json
from mb.compare import FileDiff, compare, is_git_path
from mb.render.diff import render_diff, render_stat
from mb.render.text import count, is_coloured

if TYPE_CHECKING:
    from mb.client import Client
    from mb.download import SourceChanges

_EXAMPLES = examples(
    "mb diff fix-tests              what its agents changed",
    "mb diff fix-tests --stat       only which paths, and how much",
    "mb diff fix-tests | git apply  take the changes over",
)

# How many paths that are left out are named.
NAMED_MAX = 20


@dataclass(frozen=True, slots=True)
class _SourceDiff:
    guest_path: str
    diffs: list[FileDiff]
    hidden: int


@click.command(epilog=_EXAMPLES)
@name_argument
@click.option("--stat", is_flag=True, help="Only the paths and how many lines changed.")
@click.option("--with-git", is_flag=True, help="Also what changed in git's own folder, .git.")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, *, stat: bool, with_git: bool, as_json: bool) -> None:
    """Show what the sandbox NAME changed, against the sources it was given. Both are fetched and their digests verified."""
    sources = call(ctx, lambda client: _fetch_diffs(client, name, with_git))
    if as_json:
        print_json({"sources": [_to_json(source, stat) for source in sources]})
        return
    left_out = [diff for source in sources for diff in source.diffs if diff.is_left_out]
    for source in sources:
        if len(sources) > 1:
            click.echo(f"# {source.guest_path}")
        if not source.diffs:
            click.echo("no changes", err=True)
        elif stat:
            click.echo("\n".join(render_stat(source.diffs)))
        else:
            _print_diff(source.diffs)
        if source.hidden:
            click.echo(f"{count(source.hidden, 'change')} in .git not shown; --with-git shows them", err=True)
    if left_out and not stat and not sys.stdout.isatty():
        names = ", ".join(diff.path for diff in left_out[:NAMED_MAX]) + (" and more" if left_out[NAMED_MAX:] else "")
        message = f"{count(len(left_out), 'path')} left out of the patch: {names}: no text and too large"
        raise HostFaultError("patch_incomplete", message, f"mb get {name} takes all")


async def _fetch_diffs(client: "Client", name: str, with_git: bool) -> list[_SourceDiff]:
    from mb.download import fetch_result, temporary_files  # noqa: PLC0415 (imports gRPC)

    sandbox = await client.get_sandbox(name)
    with temporary_files(1 + len(sandbox.spec.sources)) as files:
        result = await fetch_result(client, sandbox, files)
        return [await asyncio.to_thread(_compare_all, source, result.stream, with_git) for source in result.sources]


def _compare_all(source: "SourceChanges", new_stream: Any, with_git: bool) -> _SourceDiff:
    shown = [change for change in source.changes if with_git or not is_git_path(change.path)]
    diffs = [compare(change, source.stream, new_stream) for change in shown]
    return _SourceDiff(source.guest_path, diffs, len(source.changes) - len(shown))


def _print_diff(diffs: list[FileDiff]) -> None:
    lines = render_diff(diffs, is_terminal=sys.stdout.isatty(), is_coloured=is_coloured(sys.stdout))
    text = "".join(line + "\n" for line in lines)
    click.echo(text.encode("utf-8", "replace"), nl=False, color=True)
    unseen = [diff for diff in diffs if not diff.lines]
    if unseen:
        click.echo("\n".join(f"{diff.kind} {diff.path!r}: {diff.remark}" for diff in unseen), err=True)


def _to_json(source: _SourceDiff, is_stat: bool) -> dict[str, Any]:
    changes = [
        {
            "path": diff.path,
            "kind": diff.kind,
            "insertions": diff.insertions,
            "deletions": diff.deletions,
            "remark": diff.remark,
            "is_left_out": diff.is_left_out,
        }
        | ({} if is_stat else {"diff": "".join(line + "\n" for line in diff.patch or diff.lines)})
        for diff in source.diffs
    ]
    return {"guest_path": source.guest_path, "changes": changes, "hidden_git_changes": source.hidden}
