"""What one scheduler has acknowledged no other calls unknown, however far its watch is behind."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from bedplate.sandbox.v1 import service_pb2
from fleet.codec import to_message
from fleet.identity import Role
from fleet.store.memory import MemoryStore
from fleet.store.port import WatchEvent
from tests.integration.scheduler.parts import HANG_S, Fleet
from tests.unit.scheduler.build import sandbox_id, spec


class LateStore:
    """A store whose watches tell nothing until `caught_up` is set."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.caught_up = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @asynccontextmanager
    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[AsyncIterator[Sequence[WatchEvent]]]:
        """The store's watch, late."""
        async with self._store.watch(prefix, from_revision) as batches:
            yield self._late(batches)

    async def _late(self, batches: AsyncIterator[Sequence[WatchEvent]]) -> AsyncIterator[Sequence[WatchEvent]]:
        async for batch in batches:
            await self.caught_up.wait()
            yield batch


@pytest.mark.parametrize("named", [sandbox_id(1), "box-1"])
async def test_another_schedulers_sandbox_is_known(memory: MemoryStore, pki: Path, named: str) -> None:
    """Created through one, destroyed through another at once, by id or by name: it is waited for, not unknown."""
    late: Any = LateStore(memory)
    async with Fleet(memory, pki).running() as first, Fleet(late, pki).running() as second:
        await first.answers()
        await second.answers()
        clients = [fleet.client(Role.TENANT, "demo").sandboxes for fleet in (first, second)]
        request = service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id(1), spec=to_message(spec(1)))
        await clients[0].CreateSandbox(request)
        asking = asyncio.ensure_future(clients[1].DestroySandbox(service_pb2.GetSandboxRequest(sandbox=named)))
        asyncio.get_running_loop().call_later(0.2, late.caught_up.set)
        async with asyncio.timeout(HANG_S):
            assert (await asking).sandbox_id == sandbox_id(1)


async def test_what_nobody_knows_is_unknown(memory: MemoryStore, pki: Path) -> None:
    """A sandbox that is nowhere is unknown at once, though the watch is late."""
    late: Any = LateStore(memory)
    async with Fleet(late, pki).running() as fleet:
        await fleet.answers()
        client = fleet.client(Role.TENANT, "demo").sandboxes
        for named in (sandbox_id(2), "nowhere"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.GetSandbox(service_pb2.GetSandboxRequest(sandbox=named))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
