"""One channel to several servers that all serve the same: calls go to one of them until it fails or is silent, then to the next.

Generated stubs take it in place of a grpc.aio.Channel. A call that may be asked twice is asked of each in turn; all others, and
streams, fail as ever, and the next call goes to another server.
"""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

import os
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import Any

import grpc

from fleet.rpc import TlsPair, code_of_ended, open_channel

# A server that is silent for so long is left: a call takes milliseconds, and the slowest, which waits for the store, five seconds.
SILENCE_S = 6.0
_MOVING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class FailoverChannel:
    """Channels to several servers as one; methods in `once` ("/service/Method") are never asked twice."""

    def __init__(self, channels: Sequence[grpc.aio.Channel], once: Collection[str], first: int) -> None:
        """`first` is the index of the server to begin with, so that clients spread over them."""
        self._channels = tuple(channels)
        self._once = frozenset(once)
        self._index = first % len(self._channels)

    def unary_unary(self, path: str, *arguments: Any, **keywords: Any) -> Any:
        """A method of one request and one answer."""
        methods: list[Any] = [channel.unary_unary(path, *arguments, **keywords) for channel in self._channels]

        async def call(request: Any, timeout: float, **options: Any) -> Any:  # noqa: ASYNC109 (as grpc's own methods)
            ends_s = monotonic() + timeout
            for left in range(len(methods) - 1, -1, -1):
                index, left_s = self._index, ends_s - monotonic()
                is_last = left == 0 or path in self._once
                try:
                    return await methods[index](
                        request, timeout=left_s if is_last else min(SILENCE_S, left_s), **options
                    )
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _MOVING:
                        raise
                    self._leave(index)
                    if is_last or monotonic() >= ends_s:
                        raise
            raise AssertionError("the last server answers or fails")

        return call

    def unary_stream(self, path: str, *arguments: Any, **keywords: Any) -> Any:
        """A method of one request and many answers."""
        return self._stream([channel.unary_stream(path, *arguments, **keywords) for channel in self._channels])

    def stream_unary(self, path: str, *arguments: Any, **keywords: Any) -> Any:
        """A method of many requests and one answer."""
        return self._stream([channel.stream_unary(path, *arguments, **keywords) for channel in self._channels])

    def stream_stream(self, path: str, *arguments: Any, **keywords: Any) -> Any:
        """A method of many requests and many answers."""
        return self._stream([channel.stream_stream(path, *arguments, **keywords) for channel in self._channels])

    def _stream(self, methods: Sequence[Any]) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            index = self._index
            begun = methods[index](*arguments, **keywords)
            begun.add_done_callback(lambda ended: self._look(index, ended))
            return begun

        return call

    def _look(self, index: int, ended: Any) -> None:
        # A stream's deadline is its age and says nothing of the server.
        if code_of_ended(ended) is grpc.StatusCode.UNAVAILABLE:
            self._leave(index)

    def _leave(self, index: int) -> None:
        if index == self._index:
            self._index = (index + 1) % len(self._channels)


@asynccontextmanager
async def open_failover(
    addresses: Sequence[str], tls: TlsPair, server_name: str, once: Collection[str] = ()
) -> AsyncIterator[Any]:
    """A channel to whichever of `addresses` ("ip:port" each) answers; nothing is sent before the first call."""
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(open_channel(address, tls, server_name)) for address in addresses]
        yield FailoverChannel(channels, once, os.getpid())
