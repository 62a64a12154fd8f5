"""Keeps reading through broken connections: a stream that breaks is opened again from where it was."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fleet.errors import BedplateError, UnavailableError
from fleet.model.assignment import Sandbox
from fleet.model.egress import NetworkEvent
from fleet.model.event import Event
from mb.client import Client
from mb.live import Chunk, OutputRange

# About a minute in all: a scheduler that restarts is back long before.
RECONNECTS_MAX = 14
RECONNECT_S_MIN, RECONNECT_S_MAX = 0.5, 5.0

# Events that are remembered so that a stream that is opened again tells none twice: past as many as a scheduler tells of what is
# there (20,000).
TOLD_MAX = 30_000
# How far the clocks of those who record events may be apart: what is a little older may still be news.
CLOCKS_MS = 60_000

E = TypeVar("E", Event, NetworkEvent)
Notify = Callable[[str], None]
Pause = Callable[[float], Awaitable[None]]


class Reconnects:
    """Counts failures in a row and waits longer after each; raises the failure when there were too many.

    A stream's deadline is no failure: it is opened anew. That of a call which `is_stream` is not for is one like any other.
    """

    def __init__(self, notify: Notify, *, is_stream: bool = True, pause: Pause = asyncio.sleep) -> None:
        self._failures = 0
        self._notify = notify
        self._is_stream = is_stream
        self._pause = pause

    def succeed(self) -> None:
        """Something arrived."""
        self._failures = 0

    async def retry_after(self, error: BedplateError) -> None:
        """Returns when it is time to try again; raises `error` if that is of no use."""
        if error.code == "deadline_exceeded" and self._is_stream:
            return
        if not _is_passing(error) or self._failures >= RECONNECTS_MAX:
            raise error
        if self._failures == 0:
            self._notify(f"{error.message}; trying again")
        await self._pause(min(RECONNECT_S_MIN * 2**self._failures, RECONNECT_S_MAX))
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
    client: Client, name: str, agent: str, wanted: OutputRange, *, follow: bool, notify: Notify
) -> AsyncIterator[Chunk]:
    """An agent's output, gapless through broken connections; with `follow` until nothing can follow.

    Where a time or a number of lines is wanted the first chunk says at which byte that is.
    """
    reconnects = Reconnects(notify)
    is_placed = not (wanted.since_ms or wanted.tail_lines)
    while True:
        try:
            async for chunk in client.live.read_output(name, agent, wanted, follow=follow):
                reconnects.succeed()
                # A sandbox that has moved begins anew, and so does its output.
                is_further = bool(wanted.placement) and chunk.placement > wanted.placement
                if is_placed and chunk.offset != (0 if is_further else wanted.offset):
                    message = f"output of {agent or name} came from byte {chunk.offset}, not {wanted.offset}"
                    raise BedplateError("output_gap", message, "see the host's log")
                is_placed = True
                wanted = OutputRange(chunk.offset + len(chunk.payload), placement=chunk.placement)
                if chunk.payload:
                    yield chunk
                if chunk.end:
                    return
            if not follow:
                return
            raise UnavailableError("output_cut", "the output ended early", "read on with --offset")
        except BedplateError as error:
            await reconnects.retry_after(error)


async def read_events(
    client: Client, name: str, since_ms: int, *, follow: bool, notify: Notify
) -> AsyncIterator[Event]:
    """Events since a moment, each once, through broken connections; with `follow` until the one sandbox `name` is removed."""
    wanted = name

    def open_stream(since_ms: int) -> AsyncIterator[Event]:
        return client.live.read_events(wanted, since_ms, follow=follow)

    async for event in _each_once(open_stream, since_ms, is_endless=follow and not name, notify=notify):
        # Its name may be another's when the stream is opened again; its id never is.
        wanted = event.sandbox_id if name else ""
        yield event


async def read_network(
    client: Client, name: str, since_ms: int, *, follow: bool, denied: bool, notify: Notify
) -> AsyncIterator[NetworkEvent]:
    """A sandbox's network log since a moment, each event once, through broken connections; with `follow` until it is removed."""
    wanted = name

    def open_stream(since_ms: int) -> AsyncIterator[NetworkEvent]:
        return client.live.read_network(wanted, since_ms, follow=follow, denied=denied)

    async for event in _each_once(open_stream, since_ms, is_endless=False, notify=notify):
        wanted = event.sandbox_id
        yield event


async def _each_once(
    open_stream: Callable[[int], AsyncIterator[E]], since_ms: int, *, is_endless: bool, notify: Notify
) -> AsyncIterator[E]:
    """What streams tell that are opened one after the other, from a little before the newest on; the oldest comes first."""
    reconnects = Reconnects(notify)
    told: dict[tuple[object, ...], None] = {}
    newest_ms = 0
    while True:
        try:
            async for event in open_stream(max(since_ms, newest_ms - CLOCKS_MS)):
                reconnects.succeed()
                identity = _identity(event)
                if identity in told:
                    continue
                newest_ms = max(newest_ms, event.at_ms)
                told[identity] = None
                if len(told) > TOLD_MAX:
                    del told[next(iter(told))]
                yield event
            if not is_endless:
                return
            raise UnavailableError("events_cut", "the events ended early", "follow them again")
        except BedplateError as error:
            await reconnects.retry_after(error)


def _identity(event: Event | NetworkEvent) -> tuple[object, ...]:
    if isinstance(event, Event):
        return event.origin, event.seq
    # Another host counts anew, at a later time.
    return event.seq, event.at_ms


def _is_passing(error: BedplateError) -> bool:
    # A server that stops gracefully cancels what is left after its grace period.
    return isinstance(error, UnavailableError) or error.code == "call_cancelled"
