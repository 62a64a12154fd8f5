"""`mb up`: from a jcard to a sandbox's end."""

import asyncio
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fleet.errors import BedplateError, UnavailableError
from fleet.model.ids import SandboxId, is_sandbox_id, make_sandbox_id
from fleet.model.sandbox import Phase
from fleet.model.units import MIB, render_bytes
from mb.commands.options import WaitedLongEnough, call, examples, json_option, print_json, within
from mb.copies import COPIES_MAX, copies_of, create_copies
from mb.exits import Exit
from mb.moments import parse_span_s
from mb.prepare import PackedSource, Prepared, prepared
from mb.render.output import OutputPrinter
from mb.render.progress import Progress, render_summary
from mb.render.sandbox import to_json
from mb.render.text import count

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from mb.client import Client

# A lost answer is asked for again, with the same id: it is the same sandbox.
CREATE_RETRY_S = (0.5, 1.0, 2.0, 4.0)
# How often a long upload says how far it is.
SENT_STEP_BYTES = 32 * MIB

_EXAMPLES = examples(
    "mb up                       the jcard here",
    "mb up agents/fix --rm       and remove the sandbox afterwards",
    "mb up --detach --json       start it, print it, do not wait",
    "mb up --count 8 --gang      eight of it, placed all at once or not at all",
)


@click.command(epilog=_EXAMPLES)
@click.argument("path", type=click.Path(path_type=Path), default=".")
@click.option("--name", default="", help="Name of the sandbox, instead of the jcard's.")
@click.option("--budget", default="", metavar="ACCOUNT", help="The account that pays, instead of the jcard's.")
@click.option(
    "--parent", default="", metavar="NAME", help="The sandbox that it is a child of: it counts in its limits."
)
@click.option("--detach", is_flag=True, help="Do not wait for its end.")
@click.option("--rm", "remove", is_flag=True, help="Destroy it when it has ended, results included.")
@click.option("--id", "sandbox_id", default="", help="The id of an earlier try: the same request is the same sandbox.")
@click.option("--wait-timeout", default="", metavar="SPAN", help="Let go after this long, such as 90s; exit 124.")
@click.option(
    "--count", type=click.IntRange(1, COPIES_MAX), help="So many, NAME-0, NAME-1 …; does not wait for their ends."
)
@click.option("--gang", is_flag=True, help="With --count: placed all at once or not at all.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    path: Path,
    *,
    name: str,
    budget: str,
    parent: str,
    detach: bool,
    remove: bool,
    sandbox_id: str,
    wait_timeout: str,
    count: int | None,
    gang: bool,
    as_json: bool,
) -> None:
    """Start a sandbox from the jcard at PATH (a file or its folder; default: here) and follow it to its end.

    Agents' output goes to stdout, progress to stderr. With --json stdout holds one object, the sandbox as it ended, and output
    goes to stderr too. Ctrl-C lets go: the sandbox runs on. The jcard's secrets are sent whenever the sandbox waits for them; with
    --detach mb returns once they are there.
    """
    _check_usage(detach=detach, remove=remove, gang=gang, number=count, sandbox_id=sandbox_id)
    wait_s = parse_span_s(wait_timeout, "--wait-timeout") if wait_timeout else None
    run = _Run(
        SandboxId(sandbox_id) or make_sandbox_id(secrets.token_bytes),
        Progress(sys.stderr),
        as_json=as_json,
        removes=remove,
        payers=(budget, parent),
    )
    try:
        if count is not None:
            _start_copies(ctx, run, (path, name), (count, gang, wait_s))
            return
        with prepared(path, name=name, keep_tars=True) as found:
            sandbox = call(ctx, lambda client: run.start(client, found))
        if not detach:
            sandbox = call(ctx, lambda client: within(wait_s, run.follow(client, sandbox)))
        elif found.spec.secrets:
            sandbox = call(ctx, lambda client: within(wait_s, run.deliver(client, sandbox)))
        if remove:
            call(ctx, lambda client: run.destroy(client, sandbox))
    except WaitedLongEnough:
        run.let_go()
        ctx.exit(Exit.TIMED_OUT)
    except KeyboardInterrupt:
        run.let_go()
        ctx.exit(Exit.INTERRUPTED)
    if as_json:
        print_json(to_json(sandbox))
    elif detach:
        click.echo(f"{sandbox.spec.name} {sandbox.sandbox_id}")
    if not detach and sandbox.phase is not Phase.COMPLETED:
        ctx.exit(Exit.ENDED_BADLY)


def _check_usage(*, detach: bool, remove: bool, gang: bool, number: int | None, sandbox_id: str) -> None:
    if detach and remove:
        raise click.UsageError("--detach and --rm exclude each other")
    if gang and number is None:
        raise click.UsageError("--gang needs --count")
    if remove and number is not None:
        raise click.UsageError("--count and --rm exclude each other")
    if sandbox_id and not is_sandbox_id(sandbox_id):
        raise click.BadParameter("an id is 12 characters of a-z and 2-7", param_hint="--id")


def _start_copies(ctx: click.Context, run: "_Run", what: tuple[Path, str], how: tuple[int, bool, float | None]) -> None:
    """Asks for all, prints those that there are, then raises what stood in the way of the first that there is not."""
    (path, name), (number, is_gang, wait_s) = what, how
    with prepared(path, name=name, keep_tars=True) as found:
        made = call(ctx, lambda client: run.start_copies(client, found, number, is_gang=is_gang))
    sandboxes = [one for one in made if not isinstance(one, BedplateError)]
    if found.spec.secrets and sandboxes:
        sandboxes = call(ctx, lambda client: within(wait_s, run.deliver_all(client, sandboxes)))
    if run.as_json:
        print_json([to_json(sandbox) for sandbox in sandboxes])
    else:
        for sandbox in sandboxes:
            click.echo(f"{sandbox.spec.name} {sandbox.sandbox_id}")
    error = next((one for one in made if isinstance(one, BedplateError)), None)
    if error is not None:
        raise error


class _Run:
    """One `mb up` under way."""

    def __init__(
        self, sandbox_id: SandboxId, progress: Progress, *, as_json: bool, removes: bool, payers: tuple[str, str]
    ) -> None:
        self._budget, self._parent = payers
        self._sandbox_id = sandbox_id
        self._progress = progress
        self.as_json = as_json
        self._removes = removes
        self._created: Sandbox | None = None
        self._secrets: dict[str, bytes] = {}

    async def start_copies(
        self, client: "Client", found: Prepared, number: int, *, is_gang: bool
    ) -> "list[Sandbox | BedplateError]":
        """Sends what the fleet does not hold, then asks for so many sandboxes, in one call."""
        found = await self._with_payers(client, found)
        creations = copies_of(found.spec, self._sandbox_id, number, is_gang=is_gang)
        await self._prepare(client, found)
        made = await create_copies(client, creations, CREATE_RETRY_S, self._progress.say)
        missing = sum(isinstance(one, BedplateError) for one in made)
        self._progress.say(f"{number - missing} of {number} sandboxes are asked for")
        if missing:
            self._progress.say(f"mb up --id {self._sandbox_id} with the same options asks for the same ones again")
        return made

    async def _with_payers(self, client: "Client", found: Prepared) -> Prepared:
        """With the account and the parent that were named."""
        spec = replace(found.spec, budget=self._budget or found.spec.budget)
        if self._parent:
            spec = replace(spec, parent=(await client.get_sandbox(self._parent)).sandbox_id)
        return replace(found, spec=spec)

    async def deliver_all(self, client: "Client", sandboxes: "Sequence[Sandbox]") -> "list[Sandbox]":
        """Waits until each asks for its secrets, and sends them."""
        return list(await asyncio.gather(*(self.deliver(client, one) for one in sandboxes)))

    async def start(self, client: "Client", found: Prepared) -> "Sandbox":
        """Sends what the fleet does not hold, then asks for the sandbox."""
        found = await self._with_payers(client, found)
        await self._prepare(client, found)
        self._created = await self._create(client, found)
        self._progress.say(f"sandbox {found.spec.name} ({self._sandbox_id}) is asked for")
        return self._created

    async def follow(self, client: "Client", sandbox: "Sandbox") -> "Sandbox":
        """Follows it to its end and sums it up."""
        from mb.follow import follow_sandbox  # noqa: PLC0415 (imports gRPC)

        stream = sys.stderr if self.as_json else sys.stdout
        printer = OutputPrinter(stream, prefix=len(sandbox.spec.agents) > 1)
        show, say = self._progress.show, self._progress.say
        sandbox = await follow_sandbox(client, sandbox, printer, show, say, secrets=self._secrets)
        click.echo("\n".join(render_summary(sandbox, is_kept=not self._removes)), err=True)
        return sandbox

    async def deliver(self, client: "Client", sandbox: "Sandbox") -> "Sandbox":
        """Waits until it asks for its secrets, and sends them."""
        from mb.secrets import deliver_secrets  # noqa: PLC0415 (imports gRPC)

        return await deliver_secrets(client, sandbox, self._secrets, self._progress.show, self._progress.say)

    async def destroy(self, client: "Client", sandbox: "Sandbox") -> None:
        """Removes it, and returns once nothing of it is left."""
        from mb.follow import wait_removed  # noqa: PLC0415 (imports gRPC)

        await client.destroy_sandbox(sandbox.sandbox_id)
        await wait_removed(client, sandbox, self._progress.say)
        self._progress.say("destroyed; nothing is left of it")

    def let_go(self) -> None:
        """Says how to go on after an interruption."""
        if self._created is None:
            self._progress.say(f"interrupted; mb up --id {self._sandbox_id} goes on with the same sandbox")
            return
        name = self._created.spec.name
        secrets = f"; should it wait for its secrets: mb secret send {name} JCARD" if self._secrets else ""
        self._progress.say(
            f"let go; {name} goes on: mb logs {name} --follow, mb status {name}, mb stop {name}{secrets}"
        )

    async def _prepare(self, client: "Client", found: Prepared) -> None:
        self._secrets = found.reveal_secrets()
        for note in found.notes:
            self._progress.say(f"note: {note}")
        for source in found.sources:
            await self._send(client, source)

    async def _send(self, client: "Client", source: PackedSource) -> None:
        packed, size = source.packed, render_bytes(source.packed.size_bytes)
        self._progress.say(f"packed {source.shared.host}: {count(packed.members, 'path')}, {size}")
        if await client.has_source(packed.digest):
            self._progress.say("the fleet holds it already")
            return
        assert source.stream is not None
        told_bytes = 0

        def sent(size_bytes: int) -> None:
            nonlocal told_bytes
            if size_bytes - told_bytes >= SENT_STEP_BYTES:
                told_bytes = size_bytes
                self._progress.say(f"sent {render_bytes(size_bytes)} of {size}")

        await client.upload_source(packed, source.stream, sent)
        self._progress.say(f"sent {size}")

    async def _create(self, client: "Client", found: Prepared) -> "Sandbox":
        for delay_s in CREATE_RETRY_S:
            try:
                return await client.create_sandbox(self._sandbox_id, found.spec)
            except UnavailableError as error:
                self._progress.say(f"{error.message}; asking again")
                await asyncio.sleep(delay_s)
        try:
            return await client.create_sandbox(self._sandbox_id, found.spec)
        except UnavailableError as error:
            next_step = f"mb up --id {self._sandbox_id} asks for the same sandbox again"
            raise UnavailableError(error.code, error.message, next_step) from error
