"""`mb logs`."""

import codecs
import sys
import time
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
from mb.render.output import OutputPrinter
from mb.render.sandbox import render_cut

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from mb.client import Client
from mb.live import Chunk, OutputRange

TAIL_LINES_MAX = 1_000_000

_EXAMPLES = examples(
    "mb logs fix-tests                   what its only agent has printed so far",
    "mb logs fix-tests fixer --follow    and what it prints until it ends",
    "mb logs fix-tests --since 10m --tail 20",
    "mb logs fix-tests --offset 4096     from that byte on",
    "mb logs fix-tests --follow --json   one object a line, for programs",
    "mb logs fix-tests > output          the exact bytes",
)


@click.command(epilog=_EXAMPLES)
@name_argument
@agent_argument
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
    follow: bool,
    since: str,
    tail: int | None,
    offset: int,
    as_json: bool,
) -> None:
    """Print the output of AGENT in the sandbox NAME; AGENT may be left out when there is only one.

    On a terminal, characters that could steer it are written out. With --json: one object, with the bytes decoded as UTF-8; with
    --follow too: one object a line, as it comes. With --follow the last agent's end waits for the changes too, so that mb
    diff can come next.
    """
    wanted = _wanted(offset, since, tail)
    sink: _JsonSink | _TextSink = _JsonSink(is_live=follow) if as_json else _TextSink()

    async def read(client: "Client") -> "Sandbox":
        from mb.follow import wait_result  # noqa: PLC0415 (imports gRPC)
        from mb.resume import read_output  # noqa: PLC0415

        sandbox = await client.get_sandbox(name)
        sink.agent = find_agent(sandbox, agent).name
        async for chunk in read_output(client, sandbox.sandbox_id, sink.agent, wanted, follow=follow, notify=notify):
            sink.take(chunk)
        return await (wait_result(client, sandbox, sink.agent, notify) if follow else client.get_sandbox(name))

    sandbox = call(ctx, read)
    sink.finish(wanted.offset)
    for status in sandbox.status.agents if sandbox.status else ():
        if status.name == sink.agent and status.output_truncated:
            notify(f"{sink.agent}: {render_cut(status)}; what it printed after that is gone")


def _wanted(offset: int, since: str, tail: int | None) -> "OutputRange":
    from mb.live import OutputRange  # noqa: PLC0415 (imports gRPC)

    if offset and (since or tail):
        raise click.UsageError("--offset excludes --since and --tail")
    since_ms = parse_since_ms(since, time.time_ns() // 1_000_000) if since else 0
    return OutputRange(offset, since_ms, tail or 0)


class _TextSink:
    """Prints output as it comes."""

    def __init__(self) -> None:
        self.agent = ""
        self._printer = OutputPrinter(sys.stdout, prefix=False)

    def take(self, chunk: "Chunk") -> None:
        """Prints the next bytes."""
        self._printer.write(self.agent, chunk.payload)

    def finish(self, offset: int) -> None:
        """Nothing is held back."""


class _JsonSink:
    """Prints output as objects: one at the end or, live, one for each piece."""

    def __init__(self, *, is_live: bool) -> None:
        self.agent = ""
        self._is_live = is_live
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._texts: list[str] = []
        self._first: int | None = None
        self._next = 0

    def take(self, chunk: "Chunk") -> None:
        """Holds or prints the next bytes; a character that comes in two pieces is printed with its second."""
        self._first = chunk.offset if self._first is None else self._first
        self._next = chunk.offset + len(chunk.payload)
        self._texts.append(self._decoder.decode(chunk.payload))
        if self._is_live:
            self._print(chunk.offset)

    def finish(self, offset: int) -> None:
        """Prints what is left; `offset` says where the output begins when there is none."""
        self._texts.append(self._decoder.decode(b"", final=True))
        if self._first is None:
            self._first = self._next = offset
        if not self._is_live or any(self._texts):
            self._print(self._first if not self._is_live else self._next)

    def _print(self, offset: int) -> None:
        printed = {"agent": self.agent, "offset": offset, "next_offset": self._next, "text": "".join(self._texts)}
        self._texts.clear()
        (print_json_line if self._is_live else print_json)(printed)
