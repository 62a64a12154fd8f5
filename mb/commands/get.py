"""`mb get`."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet.errors import ConflictError, HostFaultError
from mb.commands.options import call, examples, json_option, name_argument, print_json
from mb.render.text import clean, count
from mb.writeback import Action, Choices, Step, apply_writeback, left_alone, look, plan_writeback

if TYPE_CHECKING:
    from mb.client import Client
    from mb.download import Result

# How many paths of one kind are named before "and N more".
NAMED_MAX = 20

_EXAMPLES = examples(
    "mb get fix-tests             into the folder fix-tests",
    "mb get fix-tests . --delete  over the folder it came from, deletions too",
    "mb get fix-tests --tar a.tar the artifact as the sandbox sent it",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@click.argument("dest", type=click.Path(path_type=Path), required=False)
@click.option("--delete", "delete", is_flag=True, help="Also delete what was deleted there.")
@click.option("--force", is_flag=True, help="Overwrite what was changed here since.")
@click.option("--with-git", is_flag=True, help="Also what changed in git's own folder, .git. Git runs what is in it.")
@click.option("--tar", type=click.Path(path_type=Path), help="Write the artifact to this file instead.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    name: str,
    dest: Path | None,
    *,
    delete: bool,
    force: bool,
    with_git: bool,
    tar: Path | None,
    as_json: bool,
) -> None:
    """Write what the sandbox NAME changed into the folder DEST (default: one of its name).

    A file here is overwritten when it is as it went into the sandbox; one that was changed here since is a conflict: then
    nothing is written, unless --force says to overwrite. With several sources each gets its guest path below DEST.
    """
    if tar is not None:
        _save_tar(ctx, name, tar, force, as_json)
        return
    steps = call(ctx, lambda client: _get(client, name, dest, Choices(force, delete, with_git)))
    if as_json:
        print_json({"steps": [_to_json(folder, step) for folder, step in steps]})
    else:
        _print_steps(steps)


async def _get(client: "Client", name: str, dest: Path | None, choices: Choices) -> list[tuple[Path, Step]]:
    from mb.download import fetch_result, temporary_files  # noqa: PLC0415 (imports gRPC)

    sandbox = await client.get_sandbox(name)
    with temporary_files(1 + len(sandbox.spec.sources)) as files:
        result = await fetch_result(client, sandbox, files)
        return await asyncio.to_thread(_write_result, result, dest or Path(sandbox.spec.name), choices)


def _write_result(result: "Result", dest: Path, choices: Choices) -> list[tuple[Path, Step]]:
    planned: list[tuple[Path, list[Step]]] = []
    for source in result.sources:
        folder = dest / source.guest_path.lstrip("/") if len(result.sources) > 1 else dest
        here = look(folder, source.changes, source.stream, result.stream)
        planned.append((folder, plan_writeback(source.changes, here, choices)))
    conflicts = [
        f"{folder / step.change.path} ({step.reason})"
        for folder, steps in planned
        for step in steps
        if step.action is Action.CONFLICT
    ]
    if conflicts:
        message = f"nothing was written, for these are in the way: {_listed(conflicts)}"
        raise ConflictError("changed_here", message, "name another folder, or overwrite files with --force")
    for folder, steps in planned:
        apply_writeback(folder, steps, result.stream)
    return [(folder, step) for folder, steps in planned for step in steps]


def _save_tar(ctx: click.Context, name: str, path: Path, force: bool, as_json: bool) -> None:
    async def save(client: "Client") -> int:
        from mb.download import fetch_artifact  # noqa: PLC0415 (imports gRPC)

        sandbox = await client.get_sandbox(name)
        partial = path.with_name(path.name + ".part")
        try:
            with partial.open("wb") as stream:
                await fetch_artifact(client, sandbox, stream)
                size_bytes = stream.tell()
            partial.replace(path)
        except OSError as error:
            raise HostFaultError("write_failed", f"{path}: {error.strerror}", "name another file") from error
        finally:
            partial.unlink(missing_ok=True)
        return size_bytes

    if path.exists() and not force:
        raise ConflictError("file_exists", f"{path} is there already", "name another file, or use --force")
    size_bytes = call(ctx, save)
    if as_json:
        print_json({"path": str(path), "size_bytes": size_bytes})
    else:
        click.echo(f"wrote {path}; a sandbox made it: unpack it with care")


def _print_steps(steps: list[tuple[Path, Step]]) -> None:
    for folder, step in steps:
        path = clean(str(folder / step.change.path))
        if step.action in (Action.WRITE, Action.DELETE):
            click.echo(f"{'wrote' if step.action is Action.WRITE else 'deleted'} {path}")
    for reason, number in left_alone(step for _, step in steps).items():
        click.echo(f"left alone: {count(number, 'path')}: {reason}", err=True)
    if not any(step.action in (Action.WRITE, Action.DELETE) for _, step in steps):
        click.echo("nothing to write", err=True)


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - NAMED_MAX} more" if len(paths) > NAMED_MAX else ""
    return ", ".join(clean(path) for path in paths[:NAMED_MAX]) + more


def _to_json(folder: Path, step: Step) -> dict[str, Any]:
    path = str(folder / step.change.path)
    return {"path": path, "kind": step.change.kind, "action": step.action, "reason": step.reason}
