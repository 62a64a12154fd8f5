"""Channels that outlive their certificate: opened anew when its files have changed."""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

import asyncio
from collections.abc import Callable

import grpc

from fleet.credentials import LiveCredentials
from fleet.rpc import channel_credentials, channel_options


class LiveChannel:
    """A channel to one peer, opened anew when the certificate's files have changed; calls on the old one go on to their end."""

    def __init__(
        self,
        credentials: LiveCredentials,
        opened: Callable[[grpc.ChannelCredentials], grpc.aio.Channel],
        linger_s: float,
    ) -> None:
        """`opened` makes a channel; calls of an old one that last longer than `linger_s` are cancelled."""
        self._credentials = credentials
        self._opened = opened
        self._linger_s = linger_s
        self._generation = credentials.refresh()
        self._channel = opened(channel_credentials(credentials))
        self._lingering: dict[grpc.aio.Channel, asyncio.Task[None]] = {}

    def get(self) -> grpc.aio.Channel:
        """The channel for the next call; it may be another one for the call after that."""
        generation = self._credentials.refresh()
        if generation != self._generation:
            old, self._channel = self._channel, self._opened(channel_credentials(self._credentials))
            self._generation = generation
            self._lingering[old] = asyncio.create_task(old.close(self._linger_s))
            self._lingering[old].add_done_callback(lambda _task: self._lingering.pop(old, None))
        return self._channel

    async def close(self) -> None:
        """Closes it; calls on it end."""
        lingering = dict(self._lingering)
        for channel, task in lingering.items():
            task.cancel()
            await asyncio.wait({task})
            await channel.close()
        await self._channel.close()


def live_channel(address: str, credentials: LiveCredentials, server_name: str, linger_s: float) -> LiveChannel:
    """A channel to the peer at `address` that follows `credentials`."""
    options = channel_options(server_name)
    return LiveChannel(credentials, lambda now: grpc.aio.secure_channel(address, now, options=options), linger_s)
