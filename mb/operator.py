"""What operators ask of a scheduler about hosts and certificates: one method a call, every error one of fleet.errors."""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from bedplate.host.v1 import (
    enrolment_pb2,
    enrolment_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    service_pb2,
    service_pb2_grpc,
)
from fleet.codec import from_message
from fleet.failover import open_failover
from fleet.identity import SCHEDULER_SERVER_NAME
from fleet.model.host import Drain, Host
from fleet.model.scheduler import Scheduler
from fleet.rpc import translated
from mb.config import ClientConfig
from mb.live import CALL_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class GivenToken:
    """A token as text, and the end of its time in milliseconds since 1970."""

    token: str
    expires_at_ms: int


class Operator:
    """Calls under an operator's certificate to the schedulers that errors name as `peer`."""

    def __init__(self, channel: grpc.aio.Channel, peer: str) -> None:
        self._peer = peer
        # grpcio's generated stubs are typed for its synchronous twin.
        self._hosts: Any = service_pb2_grpc.HostServiceStub(channel)
        self._schedulers: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        self._enrolment: Any = enrolment_pb2_grpc.EnrolmentServiceStub(channel)

    async def list_hosts(self) -> list[Host]:
        """Every host."""
        with translated(self._peer):
            reply = await self._hosts.ListHosts(service_pb2.ListHostsRequest(), timeout=CALL_TIMEOUT_S)
        return [from_message(Host, host) for host in reply.hosts]

    async def list_schedulers(self) -> list[Scheduler]:
        """Every scheduler that serves."""
        request = scheduler_pb2.ListSchedulersRequest()
        with translated(self._peer):
            reply = await self._schedulers.ListSchedulers(request, timeout=CALL_TIMEOUT_S)
        return [from_message(Scheduler, one) for one in reply.schedulers]

    async def cordon_host(self, host_id: str, reason: str) -> Host:
        """Nothing new is placed on it."""
        request = service_pb2.CordonHostRequest(host_id=host_id, reason=reason)
        with translated(self._peer):
            return from_message(Host, await self._hosts.CordonHost(request, timeout=CALL_TIMEOUT_S))

    async def uncordon_host(self, host_id: str) -> Host:
        """It takes sandboxes again."""
        request = service_pb2.UncordonHostRequest(host_id=host_id)
        with translated(self._peer):
            return from_message(Host, await self._hosts.UncordonHost(request, timeout=CALL_TIMEOUT_S))

    async def drain_host(self, host_id: str, reason: str, *, moves: int, is_forced: bool) -> Drain:
        """What runs there goes elsewhere, `moves` at a time."""
        request = service_pb2.DrainHostRequest(host_id=host_id, reason=reason, moves_max=moves, is_forced=is_forced)
        with translated(self._peer):
            return from_message(Drain, await self._hosts.DrainHost(request, timeout=CALL_TIMEOUT_S))

    async def get_drain(self, host_id: str) -> Drain:
        """How many sandboxes still run there, and why."""
        request = service_pb2.GetDrainRequest(host_id=host_id)
        with translated(self._peer):
            return from_message(Drain, await self._hosts.GetDrain(request, timeout=CALL_TIMEOUT_S))

    async def create_token(self, host_id: str, ttl_s: int) -> GivenToken:
        """A token with which one machine may join as that host, once, within `ttl_s`."""
        request = enrolment_pb2.CreateTokenRequest(host_id=host_id, ttl_s=ttl_s)
        with translated(self._peer):
            reply = await self._enrolment.CreateToken(request, timeout=CALL_TIMEOUT_S)
        return GivenToken(reply.token, reply.expires_at_ms)

    async def revoke_host(self, host_id: str, reason: str) -> list[str]:
        """Every certificate of that host is refused; the serials of those that schedulers have signed, in hex."""
        request = enrolment_pb2.RevokeHostRequest(host_id=host_id, reason=reason)
        with translated(self._peer):
            return list((await self._enrolment.RevokeHost(request, timeout=CALL_TIMEOUT_S)).serials)

    async def publish_revocations(self, crl: bytes) -> tuple[int, int]:
        """The serials in the authority's list are refused; how many are new, and how many were known."""
        request = enrolment_pb2.PublishRevocationsRequest(crl=crl)
        with translated(self._peer):
            reply = await self._enrolment.PublishRevocations(request, timeout=CALL_TIMEOUT_S)
        return reply.added, reply.known


@asynccontextmanager
async def open_operator(config: ClientConfig) -> AsyncIterator[Operator]:
    """An operator's calls to the configured schedulers; nothing is sent before the first."""
    # A token that was made and not told stays unused until it ends; another is made only when somebody asks again.
    once = ("/bedplate.host.v1.EnrolmentService/CreateToken",)
    async with open_failover(config.addresses, config.tls, SCHEDULER_SERVER_NAME, once) as channel:
        yield Operator(channel, config.peer)
