"""Follows one sandbox to its end: its progress, and the output of all its agents at once."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from fleet.errors import BedplateError, NotFoundError, UnavailableError
from fleet.model.assignment import Sandbox
from fleet.model.sandbox import ENDED_AGENT_PHASES, ENDED_PHASES, Phase
from mb.client import Client
from mb.live import OutputRange
from mb.render.output import OutputPrinter
from mb.resume import Notify, read_output, watch_sandbox
from mb.secrets import awaits_secrets, send_secrets

# When a sandbox has ended its host holds all of its output; what is not here by then is slow, or lost with the host.
OUTPUT_REST_S = 60.0

_OVER = ENDED_PHASES | {Phase.REMOVING}


async def follow_sandbox(
    client: Client,
    sandbox: Sandbox,
    printer: OutputPrinter,
    show: Callable[[Sandbox], None],
    notify: Notify,
    *,
    secrets: Mapping[str, bytes],
) -> Sandbox:
    """The sandbox as it ended; until then `show` sees it after every change and `printer` its agents' output.

    Whenever it waits for secrets they are sent: a host that was started again has forgotten them.
    """
    names = [agent.name for agent in sandbox.spec.agents]
    try:
        async with asyncio.TaskGroup() as group:
            outputs = [group.create_task(_print_output(client, sandbox, name, printer, notify)) for name in names]
            last = await watch_to_end(client, sandbox, show, notify, secrets=secrets)
            _, unread = await asyncio.wait(outputs, timeout=OUTPUT_REST_S)
            for output in unread:
                notify(f"some output is still missing: mb logs {sandbox.spec.name}")
                output.cancel()
    except ExceptionGroup as errors:
        # Only the watch raises: one error, which the group has wrapped.
        raise errors.exceptions[0] from errors
    return last


async def wait_result(client: Client, sandbox: Sandbox, ended: Collection[str], notify: Notify) -> Sandbox:
    """The sandbox, of which the agents `ended` have printed their last, once its changes can be fetched or never will be; at
    once while other agents still run.
    """
    seen = sandbox
    with suppress(NotFoundError):
        async for seen in watch_sandbox(client, sandbox.sandbox_id, notify):
            agents = seen.status.agents if seen.status else ()
            has_result = seen.status is not None and seen.status.artifact is not None
            # The end of the output is known before the status that tells the agent's end.
            others_run = any(one.name not in ended and one.phase not in ENDED_AGENT_PHASES for one in agents)
            if has_result or others_run or seen.phase in _OVER:
                break
    return seen


async def wait_stopped(client: Client, sandbox: Sandbox, notify: Notify) -> Sandbox:
    """The sandbox once its VM has ended and its host has let go of it, so that a start is not too early."""
    seen, say_lost = sandbox, _lost_once(notify)
    with suppress(NotFoundError):
        async for seen in watch_sandbox(client, sandbox.sandbox_id, notify):
            say_lost(seen)
            if seen.phase in _OVER and (seen.status is None or seen.status.released):
                break
    return seen


async def wait_removed(client: Client, sandbox: Sandbox, notify: Notify) -> None:
    """Returns once nothing of the sandbox is left; `notify` hears of a host that is away, for it may be so for long."""
    say_lost = _lost_once(notify)
    with suppress(NotFoundError):
        async for seen in watch_sandbox(client, sandbox.sandbox_id, notify):
            say_lost(seen)


def _lost_once(notify: Notify) -> Callable[[Sandbox], None]:
    """Tells that a sandbox's host is away, once."""
    told = ""

    def say(seen: Sandbox) -> None:
        nonlocal told
        reason = seen.status.reason if seen.status else None
        if reason is not None and reason.code == "host_lost" and reason.message != told:
            told = reason.message
            notify(f"{told}; Ctrl-C lets go, and the wish stays")

    return say


async def watch_to_end(
    client: Client,
    sandbox: Sandbox,
    show: Callable[[Sandbox], None],
    notify: Notify,
    *,
    secrets: Mapping[str, bytes],
) -> Sandbox:
    """The sandbox as it ended; until then `show` sees it after every change, and `secrets` are sent when it waits for them."""
    last = sandbox
    try:
        async for last in watch_sandbox(client, sandbox.sandbox_id, notify):
            show(last)
            if secrets and awaits_secrets(last):
                await send_secrets(client, last, secrets, notify)
            if last.phase in _OVER:
                break
    except NotFoundError:
        notify("it was removed meanwhile")
    return last


async def _print_output(client: Client, sandbox: Sandbox, agent: str, printer: OutputPrinter, notify: Notify) -> None:
    wanted = OutputRange()
    while True:
        chunks = read_output(client, sandbox.sandbox_id, agent, wanted, follow=True, notify=lambda _text: None)
        try:
            async for chunk in chunks:
                printer.write(agent, chunk.payload)
                wanted = OutputRange(chunk.offset + len(chunk.payload), placement=chunk.placement)
            break
        except UnavailableError:
            # The watch says whether there is still a sandbox to wait for, and ends this too.
            continue
        except BedplateError as error:
            notify(f"output of {agent} cannot be read: {error.message}")
            break
    printer.finish(agent)
