"""Options that several verbs share, and how a verb talks to the scheduler. Imports gRPC only when a call is made."""

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fleet.errors import BedplateError, InvalidSpecError

if TYPE_CHECKING:
    from fleet.model.assignment import Sandbox
    from fleet.model.sandbox import Agent
    from mb.books import Books
    from mb.client import Client
    from mb.operator import Operator

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout; errors too, on stderr.")


def _complete_names(ctx: click.Context, _parameter: click.Parameter, typed: str) -> list[str]:
    from mb.suggest import sandbox_names  # noqa: PLC0415 (imports gRPC, and only when Tab is pressed)

    return [name for name in sandbox_names(ctx) if name.startswith(typed)]


def _complete_agents(ctx: click.Context, _parameter: click.Parameter, typed: str) -> list[str]:
    from mb.suggest import agent_names  # noqa: PLC0415 (imports gRPC, and only when Tab is pressed)

    return [name for name in agent_names(ctx) if name.startswith(typed)]


name_argument = click.argument("name", shell_complete=_complete_names)
optional_name_argument = click.argument("name", default="", shell_complete=_complete_names)
names_argument = click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=_complete_names)
agent_argument = click.argument("agent", default="", shell_complete=_complete_agents)


def examples(*lines: str) -> str:
    """An epilog that shows how a verb is used."""
    return "\n".join(["\b", "examples:", *(f"  {line}" for line in lines)])


def call(ctx: click.Context, action: Callable[["Client"], Awaitable[T]], *, about: str = "") -> T:
    """Runs `action` with a client of the configured scheduler; next steps of errors name the sandbox `about`, else the verb's."""
    import asyncio  # noqa: PLC0415 (these three take most of mb's start; offline verbs do without)

    from mb.client import open_client  # noqa: PLC0415
    from mb.config import load_client_config  # noqa: PLC0415
    from mb.diagnosis import explained  # noqa: PLC0415

    caller = ctx.find_root().obj
    config = load_client_config(caller.config, caller.tenant)

    async def run() -> T:
        async with open_client(config) as client:
            return await action(client)

    with _sandbox_named(about or str(ctx.params.get("name") or "")), explained(config):
        return asyncio.run(run())


@contextmanager
def _sandbox_named(name: str) -> Iterator[None]:
    """Within it, errors of hosts, which know a sandbox by its id, name it as the user does."""
    try:
        yield
    except BedplateError as error:
        from mb.render.text import fill_name  # noqa: PLC0415 (only an error needs it)

        error.next_step = fill_name(error.next_step, name) if name else error.next_step
        raise


def operate(ctx: click.Context, action: Callable[["Operator"], Awaitable[T]]) -> T:
    """Runs `action` with an operator's calls to the configured scheduler."""
    import asyncio  # noqa: PLC0415 (as above)

    from mb.config import load_client_config  # noqa: PLC0415
    from mb.diagnosis import explained  # noqa: PLC0415
    from mb.operator import open_operator  # noqa: PLC0415

    config = load_client_config(ctx.find_root().obj.config)

    async def run() -> T:
        async with open_operator(config) as operator:
            return await action(operator)

    with explained(config):
        return asyncio.run(run())


def find_agent(sandbox: "Sandbox", name: str, *, otherwise: str = "") -> "Agent":
    """The agent of that name, or the only one when `name` is empty.

    Raises InvalidSpecError `agent_unknown` that lists them; `otherwise` is what the verb can do without a name.
    """
    agents = sandbox.spec.agents
    found = [agent for agent in agents if name in ("", agent.name)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(agent.name for agent in agents)
    which = f"has no agent {name!r}" if name else f"has {len(agents)} agents"
    raise InvalidSpecError(
        "agent_unknown", f"{sandbox.spec.name} {which}", f"name one of: {names}{otherwise}", field="AGENT"
    )


class WaitedLongEnough(Exception):  # noqa: N818 (an outcome that was asked for)
    """What was waited for had not come when the time was over."""


async def within(seconds: float | None, waiting: Awaitable[T]) -> T:
    """What `waiting` gives, within so many seconds; raises WaitedLongEnough. None waits for ever."""
    import asyncio  # noqa: PLC0415 (offline verbs do without)

    try:
        async with asyncio.timeout(seconds):
            return await waiting
    except TimeoutError as error:
        raise WaitedLongEnough from error


def print_json(value: Any) -> None:
    """Prints `value` as JSON."""
    click.echo(json.dumps(value, indent=2))


def print_json_line(value: Any) -> None:
    """Prints `value` as JSON on one line, at once: for streams of objects."""
    click.echo(json.dumps(value))


def notify(text: str) -> None:
    """One note on stderr, within 80 columns."""
    from mb.render.text import flow  # noqa: PLC0415 (most verbs need none)

    click.echo("\n".join(flow("", text)), err=True)


def keep_books(ctx: click.Context, action: Callable[["Books"], Awaitable[T]]) -> T:
    """Runs `action` with calls about budgets to the configured scheduler."""
    import asyncio  # noqa: PLC0415 (as above)

    from mb.books import open_books  # noqa: PLC0415
    from mb.config import load_client_config  # noqa: PLC0415
    from mb.diagnosis import explained  # noqa: PLC0415

    caller = ctx.find_root().obj
    config = load_client_config(caller.config, caller.tenant)

    async def run() -> T:
        async with open_books(config) as books:
            return await action(books)

    with explained(config):
        return asyncio.run(run())
