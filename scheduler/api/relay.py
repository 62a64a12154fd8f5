"""Passes a host's stream on to a client: at the client's pace, within limits, and no longer than the client is there."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from fleet.errors import UnavailableError
from fleet.gatekeeper import ACTOR_KEY, actor_name, caller_of
from fleet.identity import Identity
from fleet.model.ids import HostId
from fleet.rpc import responses, translated

# A host reads its own disk: half a minute without a chunk means that it is stuck or gone.
IDLE_S = 30.0
# The largest source or artifact over a slow line; idle limits end everything that does not move long before.
TRANSFER_S = 3600.0
# A call that a host answers from memory.
CALL_S = 10.0


class Slots:
    """How many long calls of one kind a caller may have under way: one tenant's thousands must not starve the others."""

    def __init__(self, kind: str, per_caller_max: int) -> None:
        self._kind = kind
        self._max = per_caller_max
        self._taken: Counter[Identity] = Counter()

    def take(self, context: Any) -> None:
        """Counts the call of `context` until it ends; raises UnavailableError `calls_exhausted` when there is no slot for it."""
        caller = caller_of(context)
        if self._taken[caller] >= self._max:
            message = f"{caller.role} {caller.name} has {self._max} {self._kind} under way, as many as it may"
            raise UnavailableError("calls_exhausted", message, "end some, then try again")
        self._taken[caller] += 1
        context.add_done_callback(lambda _context: self._give_back(caller))

    def _give_back(self, caller: Identity) -> None:
        self._taken[caller] -= 1
        if not self._taken[caller]:
            del self._taken[caller]


def on_behalf_of(caller: Identity) -> tuple[tuple[str, str], ...]:
    """The metadata that tells a host for whom the scheduler calls, for its events."""
    return ((ACTOR_KEY, actor_name(caller)),)


@contextmanager
def calling(host_id: HostId) -> Iterator[None]:
    """Within it, a failed call to the host raises its error, and so does one whose channel was closed under it."""
    try:
        with translated(f"host {host_id}"):
            yield
    except asyncio.CancelledError as error:
        current = asyncio.current_task()
        if current is None or current.cancelling():
            raise
        message = f"the way to host {host_id} has changed"
        raise UnavailableError("host_moved", message, "try again") from error


async def relay(call: Any, host_id: HostId, context: Any, idle_s: float | None = IDLE_S) -> AsyncIterator[Any]:
    """The messages of `call`, read one at a time; the call is cancelled when the client's own ends, however that is.

    Raises the host's error, or UnavailableError `host_silent` when nothing comes for `idle_s`.
    """
    context.add_done_callback(lambda _context: call.cancel())
    try:
        async with aclosing(responses(call)) as messages:
            with calling(host_id):
                while (message := await _next(messages, idle_s)) is not grpc.aio.EOF:
                    yield message
    except TimeoutError as error:
        message = f"host {host_id} sent nothing for {idle_s} s"
        raise UnavailableError("host_silent", message, "try again; see the host's log") from error
    finally:
        call.cancel()


async def _next(messages: AsyncIterator[Any], idle_s: float | None) -> Any:
    async with asyncio.timeout(idle_s):
        return await anext(messages, grpc.aio.EOF)
