"""Serves the network logs of this host's sandboxes. The scheduler has resolved and authorised the request."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from bedplate.sandbox.v1 import network_pb2_grpc
from fleet.codec import to_message
from fleet.model.egress import NetworkEvent
from fleet.model.ids import SandboxId
from hostd.api.changes import Changes
from hostd.api.lookup import find_order
from hostd.orders import Orders
from hostd.traffic import Traffic


class NetworkService(network_pb2_grpc.NetworkServiceServicer):
    """Reads a sandbox's network log, and goes on with what is appended."""

    def __init__(self, orders: Orders, traffic: Traffic, changes: Changes) -> None:
        self._orders = orders
        self._traffic = traffic
        self._changes = changes

    async def ReadNetwork(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002, N802 (the stub's names)
        """Events since `since_ms`, with `denied` only those; with `follow` until the sandbox is gone or the caller is."""
        order = find_order(self._orders, request.sandbox, request.tenant)
        told = 0
        while order.sandbox_id in self._orders.orders:
            changed = self._changes.subscribe()
            events = await self._read(order.sandbox_id, told)
            for event in events:
                told = event.seq
                if event.at_ms >= request.since_ms and (event.is_denied or not request.denied):
                    yield to_message(event)
            if not request.follow:
                return
            await changed.wait()

    async def _read(self, sandbox_id: SandboxId, after_seq: int) -> list[NetworkEvent]:
        # Most changes on a host are others'.
        if self._traffic.newest(sandbox_id) <= after_seq:
            return []
        return await asyncio.to_thread(self._traffic.read, sandbox_id, after_seq)
