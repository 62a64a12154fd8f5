"""Passes a host's stream on to a client: at the client's pace, within limits, and no longer than the client is there."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from fleet.errors import UnavailableError
from fleet.model.ids import HostId
from fleet.rpc import translated

# A host reads its own disk: half a minute without a chunk means that it is stuck or gone.
IDLE_S = 30.0
# The largest source or artifact over a slow line; idle limits end everything that does not move long before.
TRANSFER_S = 3600.0


def peer_name(host_id: HostId) -> str:
    """How errors name a host."""
    return f"host {host_id}"


async def relay(call: Any, host_id: HostId, context: Any, idle_s: float | None = IDLE_S) -> AsyncIterator[Any]:
    """The messages of `call`, read one at a time; the call is cancelled when the client's own ends, however that is.

    Raises the host's error, or UnavailableError `host_silent` when nothing comes for `idle_s`.
    """
    context.add_done_callback(lambda _context: call.cancel())
    try:
        with translated(peer_name(host_id)):
            while (message := await _read(call, idle_s)) is not grpc.aio.EOF:
                yield message
    except TimeoutError as error:
        message = f"host {host_id} sent nothing for {idle_s} s"
        raise UnavailableError("host_silent", message, "try again; see the host's log") from error
    finally:
        call.cancel()


async def _read(call: Any, idle_s: float | None) -> Any:
    async with asyncio.timeout(idle_s):
        return await call.read()
