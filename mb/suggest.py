"""What Tab completes from the scheduler: names of sandboxes and of their agents. Quickly or not at all, and never an error."""

import asyncio
from pathlib import Path

import click

from fleet.errors import BedplateError
from fleet.model.assignment import Sandbox
from mb.client import open_client
from mb.config import load_client_config

# Whoever pressed Tab does not wait longer for a name.
TIMEOUT_S = 1.0


def sandbox_names(ctx: click.Context) -> list[str]:
    """The names of the caller's sandboxes."""
    return sorted({sandbox.spec.name for sandbox in _list_sandboxes(ctx)})


def agent_names(ctx: click.Context) -> list[str]:
    """The names of the agents of the sandbox that is typed already."""
    name = ctx.params.get("name")
    return [
        agent.name
        for sandbox in _list_sandboxes(ctx)
        if name in (sandbox.spec.name, sandbox.sandbox_id)
        for agent in sandbox.spec.agents
    ]


def _list_sandboxes(ctx: click.Context) -> list[Sandbox]:
    typed = ctx.find_root().params
    named = typed.get("config")

    async def ask() -> list[Sandbox]:
        config = load_client_config(Path(named) if named else None, typed.get("tenant") or "")
        async with asyncio.timeout(TIMEOUT_S), open_client(config) as client:
            return await client.list_sandboxes()

    try:
        return asyncio.run(ask())
    except (BedplateError, OSError):
        return []
