"""Second copies of sources: what only one host has is gone with it, and its sandboxes could begin nowhere else.

Beside the calls and behind them: an upload is answered when one host has it. A copy that fails is tried again when somebody asks
for the source next; none is promised. Bounded: WAITING_MAX wait, COPIERS copy at once.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from bedplate.content.v1 import content_pb2, content_pb2_grpc
from fleet.errors import BedplateError
from fleet.model.host import Reservation
from fleet.model.ids import Digest, HostId, Tenant
from scheduler.api.channels import HostChannels
from scheduler.api.relay import IDLE_S, TRANSFER_S, calling
from scheduler.placement.snapshot import Snapshot, free_of
from scheduler.state import FleetState

# One may be lost.
COPIES = 2
# Each is a stream from one host's disk to another's, and goes through this process.
COPIERS = 2
# A burst of uploads; past it the newest have one copy until they are asked for again.
WAITING_MAX = 1000

log = structlog.get_logger()


class SourceCopies:
    """Copies sources of which there are too few."""

    def __init__(self, state: FleetState, channels: HostChannels) -> None:
        self._state = state
        self._channels = channels
        self._waiting: asyncio.Queue[tuple[Tenant, Digest]] = asyncio.Queue(WAITING_MAX)
        self._known: set[tuple[Tenant, Digest]] = set()

    def want(self, tenant: Tenant, digest: Digest) -> None:
        """Somebody needs this source: there shall be COPIES of it, if there are hosts for them."""
        source = (tenant, digest)
        if source in self._known or self._waiting.full() or next_copy(self._state.snapshot(), tenant, digest) is None:
            return
        self._known.add(source)
        self._waiting.put_nowait(source)

    async def run(self) -> None:
        """Copies until cancelled."""
        async with asyncio.TaskGroup() as copiers:
            for _ in range(COPIERS):
                copiers.create_task(self._work())

    async def _work(self) -> None:
        while True:
            tenant, digest = await self._waiting.get()
            try:
                await self._copy(tenant, digest)
            except (BedplateError, TimeoutError, grpc.aio.AioRpcError) as error:
                log.warning("source.uncopied", tenant=tenant, digest=digest, error=str(error))
            finally:
                self._known.discard((tenant, digest))

    async def _copy(self, tenant: Tenant, digest: Digest) -> None:
        snapshot = self._state.fresh()
        way = next_copy(snapshot, tenant, digest)
        if way is None:
            return
        holder, target = (self._channels.channel(snapshot, host_id) for host_id in way)
        wanted = content_pb2.FetchSourceRequest(digest=digest, tenant=tenant)
        with calling(way[0]):
            fetched: Any = content_pb2_grpc.ContentServiceStub(holder).FetchSource(wanted, timeout=TRANSFER_S)
            try:
                with calling(way[1]):
                    stub = content_pb2_grpc.ContentServiceStub(target)
                    await stub.UploadSource(_upload(fetched, tenant, digest), timeout=TRANSFER_S)
            finally:
                fetched.cancel()
        log.info("source.copied", tenant=tenant, digest=digest, holder=way[0], target=way[1])


def next_copy(snapshot: Snapshot, tenant: Tenant, digest: Digest) -> tuple[HostId, HostId] | None:
    """From which live host to which one the next copy goes; None when there are enough, or no hosts for it."""
    alive = snapshot.alive & snapshot.hosts.keys()
    holders = sorted(snapshot.sources.get((tenant, digest), frozenset()) & alive)
    others = sorted(alive - set(holders))
    if not holders or len(holders) >= COPIES or not others:
        return None
    return holders[0], min(others, key=lambda host_id: (-_free_memory_mib(snapshot, host_id), host_id))


async def _upload(fetched: Any, tenant: Tenant, digest: Digest) -> AsyncIterator[Any]:
    is_begun = False
    while True:
        async with asyncio.timeout(IDLE_S):
            chunk = await fetched.read()
        if chunk is grpc.aio.EOF:
            return
        if not is_begun:
            header = content_pb2.UploadSourceHeader(digest=digest, size_bytes=chunk.size_bytes, tenant=tenant)
            yield content_pb2.UploadSourceRequest(header=header)
            is_begun = True
        yield content_pb2.UploadSourceRequest(chunk=chunk.payload)


def _free_memory_mib(snapshot: Snapshot, host_id: HostId) -> int:
    reservation = snapshot.reservations.get(host_id, Reservation(host_id))
    return free_of(snapshot.hosts[host_id].capacity, reservation).memory_mib
