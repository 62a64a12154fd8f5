"""Keeps reading through broken connections: a stream that breaks is opened again from where it was."""

import asyncio
from collections.abc import AsyncIterator, Callable

from fleet.errors import BedplateError, UnavailableError
from fleet.model.assignment import Sandbox
from mb.client import Client

# About a minute in all: a scheduler that restarts is back long before.
RECONNECTS_MAX = 14
RECONNECT_S_MIN, RECONNECT_S_MAX = 0.5, 5.0

Notify = Callable[[str], None]


class Reconnects:
    """Counts failures in a row and waits longer after each; raises the failure when there were too many."""

    def __init__(self, notify: Notify) -> None:
        self._failures = 0
        self._notify = notify

    def succeed(self) -> None:
        """Something arrived."""
        self._failures = 0

    async def retry_after(self, error: BedplateError) -> None:
        """Returns when it is time to try again; raises `error` if that is of no use."""
        if error.code == "deadline_exceeded":
            return
        if not _is_passing(error) or self._failures >= RECONNECTS_MAX:
            raise error
        if self._failures == 0:
            self._notify(f"{error.message}; trying again")
        await asyncio.sleep(min(RECONNECT_S_MIN * 2**self._failures, RECONNECT_S_MAX))
        self._failures += 1


async def watch_sandbox(client: Client, name: str, notify: Notify) -> AsyncIterator[Sandbox]:
    """A sandbox now and after every change until it is removed, through broken connections."""
    reconnects = Reconnects(notify)
    while True:
        try:
            async for sandbox in client.watch_sandbox(name):
                reconnects.succeed()
                yield sandbox
            return
        except BedplateError as error:
            await reconnects.retry_after(error)


async def read_output(
    client: Client, name: str, agent: str, offset: int, *, follow: bool, notify: Notify
) -> AsyncIterator[bytes]:
    """An agent's output from `offset`, gapless through broken connections; with `follow` until nothing can follow."""
    reconnects = Reconnects(notify)
    while True:
        try:
            async for chunk in client.read_output(name, agent, offset, follow=follow):
                reconnects.succeed()
                if chunk.offset != offset:
                    message = f"output of {agent or name} came from byte {chunk.offset}, not {offset}"
                    raise BedplateError("output_gap", message, "see the host's log")
                offset += len(chunk.payload)
                if chunk.payload:
                    yield chunk.payload
                if chunk.end:
                    return
            if not follow:
                return
            raise UnavailableError("output_cut", "the output ended early", "read on with --offset")
        except BedplateError as error:
            await reconnects.retry_after(error)


def _is_passing(error: BedplateError) -> bool:
    # A server that stops gracefully cancels what is left after its grace period.
    return isinstance(error, UnavailableError) or error.code == "call_cancelled"
