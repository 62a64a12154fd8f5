"""One channel to each host, kept while the host's address stays. Calls on a channel that is given up end as `host_moved`."""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

import asyncio

import grpc

from fleet.channels import LiveChannel, live_channel
from fleet.credentials import LiveCredentials
from fleet.errors import UnavailableError
from fleet.identity import TlsFiles, host_server_name
from fleet.model.ids import HostId
from scheduler.placement.snapshot import Snapshot

# When this scheduler's certificate is replaced, calls that are under way end on the old one: the longest is a transfer.
LINGER_S = 3600.0


class HostChannels:
    """Channels to hosts by id; a host proves its id with its certificate, whatever its address is."""

    def __init__(self, tls: TlsFiles) -> None:
        self._credentials = LiveCredentials(tls)
        self._channels: dict[HostId, tuple[str, LiveChannel]] = {}
        self._left: set[asyncio.Task[None]] = set()

    def channel(self, snapshot: Snapshot, host_id: HostId) -> grpc.aio.Channel:
        """The channel to a host that is alive by `snapshot`; raises UnavailableError `host_lost` when it is not."""
        record = snapshot.hosts.get(host_id)
        if record is None or host_id not in snapshot.alive:
            message = f"host {host_id} is not alive"
            raise UnavailableError("host_lost", message, "try again when mb host ls shows it alive")
        self._drop_stale(snapshot)
        if host_id not in self._channels:
            opened = live_channel(record.address, self._credentials, host_server_name(host_id), LINGER_S)
            self._channels[host_id] = (record.address, opened)
        return self._channels[host_id][1].get()

    async def close(self) -> None:
        """Closes every channel; calls on them end."""
        while self._channels:
            _, (_, channel) = self._channels.popitem()
            await channel.close()
        if self._left:
            await asyncio.wait(self._left)

    def _drop_stale(self, snapshot: Snapshot) -> None:
        for host_id, (address, channel) in tuple(self._channels.items()):
            record = snapshot.hosts.get(host_id)
            if record is None or record.address != address:
                del self._channels[host_id]
                closing = asyncio.create_task(channel.close())
                self._left.add(closing)
                closing.add_done_callback(self._left.discard)
