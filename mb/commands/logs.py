"""`mb logs`."""

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mb.commands.options import (
    agent_argument,
    call,
    examples,
    find_agent,
    json_option,
    name_argument,
    notify,
    print_json,
    print_json_line,
)
from mb.moments import parse_since_ms
from mb.render.logs import LineSink, ObjectSink, Sink, TextSink
from mb.render.sandbox import render_cut

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from mb.client import Client
    from mb.live import OutputRange

TAIL_LINES_MAX = 1_000_000

_EXAMPLES = examples(
    "mb logs fix-tests                   what its only agent has printed so far",
    "mb logs fix-tests fixer --follow    and what it prints until it ends",
    "mb logs fix-tests --all             every agent's, its name before each line",
    "mb logs fix-tests --since 10m --tail 20",
    "mb logs fix-tests --offset 4096     from that byte on",
    "mb logs fix-tests --follow --json   one object a line, for programs",
    "mb logs fix-tests > output          the exact bytes",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@agent_argument
@click.option("--all", "every", is_flag=True, help="Every agent's output.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the agent has ended.")
@click.option("--since", default="", metavar="WHEN", help="Not before: 10m (ago), or RFC 3339.")
@click.option("--tail", type=click.IntRange(1, TAIL_LINES_MAX), metavar="N", help="At most the last N lines.")
@click.option("--offset", type=click.IntRange(min=0), default=0, show_default=True, help="First byte to print.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    name: str,
    agent: str,
    *,
    every: bool,
    follow: bool,
    since: str,
    tail: int | None,
    offset: int,
    as_json: bool,
) -> None:
    """Print the output of AGENT in the sandbox NAME; AGENT may be left out when there is only one.

    On a terminal, characters that could steer it are written out. With --json: one object, with the bytes decoded as UTF-8 (with
    --all a list of them); with --follow too: one object a line, as it comes. With --follow the last agent's end waits for the
    changes too, so that mb diff can come next.
    """
    if every and agent:
        raise click.UsageError("--all excludes an agent's name")
    wanted = _wanted(offset, since, tail)
    sink = _sink(offset, every=every, follow=follow, as_json=as_json)

    async def read(client: "Client") -> "tuple[Sandbox, list[str]]":
        sandbox = await client.get_sandbox(name)
        if every:
            names = [one.name for one in sandbox.spec.agents]
        else:
            names = [find_agent(sandbox, agent, otherwise="; --all prints every agent's").name]
        if follow:
            return await _follow(client, sandbox, names, wanted, sink), names
        for one in names:
            await _read(client, sandbox, one, wanted, sink, follow=False)
        return await client.get_sandbox(sandbox.sandbox_id), names

    sandbox, names = call(ctx, read)
    sink.close()
    for status in sandbox.status.agents if sandbox.status else ():
        if status.name in names and status.output_truncated:
            notify(f"{status.name}: {render_cut(status)}; what it printed after that is gone")


async def _follow(
    client: "Client", sandbox: "Sandbox", names: Sequence[str], wanted: "OutputRange", sink: Sink
) -> "Sandbox":
    """Reads all of them at once, each to its end."""
    from mb.follow import wait_result  # noqa: PLC0415 (imports gRPC)

    try:
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(_read(client, sandbox, name, wanted, sink, follow=True))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return await wait_result(client, sandbox, names, notify)


async def _read(
    client: "Client", sandbox: "Sandbox", agent: str, wanted: "OutputRange", sink: Sink, *, follow: bool
) -> None:
    from mb.resume import read_output  # noqa: PLC0415 (imports gRPC)

    async for chunk in read_output(client, sandbox.sandbox_id, agent, wanted, follow=follow, notify=notify):
        sink.take(agent, chunk.offset, chunk.payload)
    sink.finish(agent)


def _wanted(offset: int, since: str, tail: int | None) -> "OutputRange":
    from mb.live import OutputRange  # noqa: PLC0415 (imports gRPC)

    if offset and (since or tail):
        raise click.UsageError("--offset excludes --since and --tail")
    since_ms = parse_since_ms(since, time.time_ns() // 1_000_000) if since else 0
    return OutputRange(offset, since_ms, tail or 0)


def _sink(offset: int, *, every: bool, follow: bool, as_json: bool) -> Sink:
    if not as_json:
        return TextSink(prefix=every)
    return LineSink(offset, print_json_line) if follow else ObjectSink(offset, print_json, is_list=every)
