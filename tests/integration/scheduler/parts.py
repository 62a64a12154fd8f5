"""A scheduler and hosts to test against: real servers over mutual TLS, on whatever store a test gives them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from bedplate.content.v1 import content_pb2_grpc
from bedplate.host.v1 import enrolment_pb2_grpc
from bedplate.host.v1 import service_pb2 as host_pb2
from bedplate.host.v1 import service_pb2_grpc as host_grpc
from bedplate.sandbox.v1 import service_pb2_grpc as sandbox_grpc
from fleet.codec import decode, encode
from fleet.identity import SCHEDULER_SERVER_NAME, Role, TlsFiles
from fleet.model.assignment import Assignment
from fleet.model.host import Accelerator
from fleet.model.ids import Digest, HostId, SandboxId, Tenant, digest_hex
from fleet.model.sandbox import AgentPhase, Artifact, Goal, Phase, SandboxStatus
from fleet.rpc import open_channel
from fleet.server import start_server
from fleet.store.keyspace import ROOT, alive_key, host_assignments, source_key, status_key
from fleet.store.mirror import Mirror
from fleet.store.port import Delete, Put, Store, Unmoved
from hostd.api.changes import Changes
from hostd.api.content import ContentService
from hostd.api.output import OutputService
from hostd.api.permissions import PERMISSIONS
from hostd.drivers.image.sources import SourceStore
from hostd.orders import Orders
from hostd.reconcile.progress import begin, begin_run, change_agent, reach_stage, render_status
from hostd.room import Room, SourceSettings
from provisioning.embedded.etcd import LOOPBACK, free_ports
from provisioning.embedded.pki import EMBEDDED_HOST, tls_files
from scheduler.__main__ import Config, serve
from scheduler.cycle import Cycle
from scheduler.issuer import EnrolmentConfig
from scheduler.quotas import Quotas
from scheduler.state import FleetState
from scheduler.submissions import Submissions
from tests.unit.scheduler.build import NOW_MS, host, host_puts

HANG_S = 20.0
# Of a decider's queue: a test fills it.
SUBMISSIONS_MAX = 300
LOCAL = HostId(EMBEDDED_HOST)


@asynccontextmanager
async def running(*bodies: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs endless bodies beside the test and ends them with it."""
    runners = [asyncio.create_task(body) for body in bodies]
    try:
        yield
    finally:
        for runner in runners:
            runner.cancel()
            with suppress(asyncio.CancelledError):
                await runner


class Decider:
    """One scheduler's loop on a store, without its API; `fence` says under which condition it believes to lead."""

    def __init__(self, store: Store, fence: Unmoved) -> None:
        self.fence = fence
        self.mirror = Mirror(store, ROOT)
        self.state = FleetState(self.mirror)
        self.now_ms = NOW_MS
        self.clock_s = 0.0
        times = (lambda: self.now_ms, lambda: self.clock_s)
        self.submissions = Submissions(SUBMISSIONS_MAX)
        self.cycle = Cycle(store, self.state, lambda: self.fence, *times, interval_s=0.2, submissions=self.submissions)


@dataclass(frozen=True, slots=True)
class Client:
    """The API's stubs under one certificate."""

    channel: grpc.aio.Channel

    @property
    def sandboxes(self) -> Any:
        return sandbox_grpc.SandboxServiceStub(self.channel)

    @property
    def output(self) -> Any:
        return sandbox_grpc.OutputServiceStub(self.channel)

    @property
    def content(self) -> Any:
        return content_pb2_grpc.ContentServiceStub(self.channel)

    @property
    def hosts(self) -> Any:
        return host_grpc.HostServiceStub(self.channel)

    @property
    def enrolment(self) -> Any:
        return enrolment_pb2_grpc.EnrolmentServiceStub(self.channel)


class Fleet:
    """A scheduler that serves on `address`, with clients by role."""

    def __init__(self, store: Store, pki: Path) -> None:
        self.store = store
        self.pki = pki
        self.address, self.enrolment_address = (f"{LOOPBACK}:{port}" for port in free_ports(2))
        self._channels: list[grpc.aio.Channel] = []

    def client(self, role: Role, name: str) -> Client:
        """A client with the certificate of that role and name."""
        channel = open_channel(self.address, tls_files(self.pki, role, name), SCHEDULER_SERVER_NAME)
        self._channels.append(channel)
        return Client(channel)

    async def close(self) -> None:
        """Closes the clients."""
        for channel in self._channels:
            await channel.close()

    async def answers(self) -> None:
        """Returns when the scheduler serves and has its store."""
        await self._until(lambda _hosts: True)

    async def knows(self, host_id: HostId, address: str = "") -> None:
        """Returns when the scheduler sees that host alive, at `address` if one is given."""

        def is_there(host: Any) -> bool:
            is_right = host.record.host_id == host_id and address in ("", host.record.address)
            return bool(is_right and host.is_alive)

        await self._until(lambda hosts: any(map(is_there, hosts)))

    async def _until(self, holds: Callable[[Sequence[Any]], bool]) -> None:
        operator = self.client(Role.OPERATOR, "operator")
        async with asyncio.timeout(HANG_S):
            while True:
                try:
                    answer = await operator.hosts.ListHosts(host_pb2.ListHostsRequest(), wait_for_ready=True)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    continue
                if holds(answer.hosts):
                    return

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Fleet"]:
        """Serves within the context."""
        stop = asyncio.Event()
        files = tls_files(self.pki, Role.SCHEDULER, "scheduler")
        enrolment = EnrolmentConfig(self.enrolment_address, self.pki / "ca.key")
        limits = Quotas(writes_at_once=500.0, writes_per_s=50.0)
        config = Config(self.address, (), files, name="under-test", enrolment=enrolment, limits=limits)
        server = asyncio.create_task(serve(config, self.store, stop))
        try:
            yield self
        finally:
            await self.close()
            stop.set()
            await server


class ObedientHost:
    """A host without VMs: hostd's own services and folders, with statuses that follow the orders at a test's command."""

    def __init__(self, store: Store, pki: Path, folder: Path, host_id: HostId = LOCAL) -> None:
        self._store = store
        self._tls: TlsFiles = tls_files(pki, Role.HOST, host_id)
        self.host_id = host_id
        self.orders = Orders(folder / "state")
        self.sources_dir = folder / "sources"
        self.sources = SourceStore(self.sources_dir)
        self.changes = Changes()
        self.mirror = Mirror(store, host_assignments(host_id))
        self.output_calls = 0
        self.output_requests: list[Any] = []
        self.address = ""
        self._left_behind: list[grpc.aio.Server] = []

    @asynccontextmanager
    async def running(self, as_host: HostId | None = None) -> AsyncIterator["ObedientHost"]:
        """Serves, is registered (as `as_host`, if it lies) and alive, and obeys within the context."""
        self._claimed = as_host or self.host_id
        await self._serve()
        try:
            async with running(self.mirror.run(), self._obey()):
                yield self
        finally:
            await self._store.transact([], [Delete(alive_key(self._claimed))])
            for server in (self._server, *self._left_behind):
                await server.stop(None)

    async def restart(self) -> None:
        """The server ends as in a crash and comes back at another address; folders and lease stay."""
        await self._server.stop(None)
        await self._serve()

    async def move(self) -> None:
        """It serves at another address; the old server stays up, as behind a firewall that keeps connections."""
        self._left_behind.append(self._server)
        await self._serve()

    async def _serve(self) -> None:
        def register(server: grpc.aio.Server) -> None:
            room = Room(self.host_id, self._store, self.sources, SourceSettings(), named=self.orders.named_sources)
            content = ContentService(self.orders, self.sources, self._source_added, room.hold)
            content_pb2_grpc.add_ContentServiceServicer_to_server(content, server)
            sandbox_grpc.add_OutputServiceServicer_to_server(_CountedOutput(self), server)

        self._server, port = await start_server(f"{LOOPBACK}:0", self._tls, PERMISSIONS, register)
        self.address = f"{LOOPBACK}:{port}"
        await self._store.transact([], host_puts(host(self._claimed, address=self.address)))

    async def print(self, sandbox_id: str, content: bytes, agent: str = "worker") -> None:
        """The agent has printed `content`."""
        with self.orders.output_path(SandboxId(sandbox_id), agent).open("ab") as stream:
            stream.write(content)
        self.changes.nudge()

    async def finish(self, sandbox_id: str, artifact: bytes, digest: Digest) -> None:
        """Every agent has ended well and the artifact is stored."""
        id_ = SandboxId(sandbox_id)
        self.orders.artifact_path(id_).write_bytes(artifact)
        progress = self.orders.progress[id_]
        for agent in progress.agents:
            progress = change_agent(progress, replace(agent, phase=AgentPhase.COMPLETED, exit_code=0))
        progress = replace(progress, artifact=Artifact(digest, len(artifact), 1))
        self.orders.put_progress(reach_stage(progress, "agents_ended", NOW_MS))
        self.changes.nudge()
        await self._publish(self.orders.orders[id_], is_released=True)

    async def start(self, sandbox_id: str) -> None:
        """The agents run."""
        id_ = SandboxId(sandbox_id)
        progress = self.orders.progress[id_]
        for agent in progress.agents:
            progress = change_agent(progress, replace(agent, phase=AgentPhase.RUNNING, started_at_ms=NOW_MS))
        self.orders.put_progress(progress)
        await self._publish(self.orders.orders[id_])

    async def ordered(self, sandbox_id: str) -> Assignment:
        """The order for a sandbox, once it is here."""
        async with asyncio.timeout(HANG_S):
            while True:
                changed = self.changes.subscribe()
                if SandboxId(sandbox_id) in self.orders.orders:
                    return self.orders.orders[SandboxId(sandbox_id)]
                await changed.wait()

    async def _obey(self) -> None:
        while True:
            changed = self.mirror.changed()
            orders = [decode(Assignment, entry.value) for entry in self.mirror.under(host_assignments(self.host_id))]
            for order in orders:
                if self.orders.orders.get(order.sandbox_id) != order:
                    await self._take(order)
            if self.mirror.is_fresh:
                for sandbox_id in set(self.orders.orders) - {order.sandbox_id for order in orders}:
                    self.orders.forget_order(sandbox_id)
                    await self._store.transact([], [Delete(status_key(self.host_id, sandbox_id))])
            self.changes.nudge()
            await changed.wait()

    async def _take(self, order: Assignment) -> None:
        if order.goal is Goal.REMOVE:
            self.orders.put_order(order)
            self.orders.remove_folder(order.sandbox_id)
            status = SandboxStatus(order.sandbox_id, self.host_id, order.generation, Phase.REMOVED, released=True)
            await self._put_status(replace(status, placement=order.placement))
            return
        progress = self.orders.progress.get(order.sandbox_id)
        if progress is None:
            self.orders.put_progress(begin(order, "", ""))
        elif progress.run < order.run:
            self.orders.put_progress(begin_run(progress, order))
        self.orders.put_order(order)
        await self._publish(order, is_released=order.goal is Goal.STOP)

    async def _publish(self, order: Assignment, *, is_released: bool = False) -> None:
        progress = self.orders.progress[order.sandbox_id]
        status = render_status(
            order, progress, accelerator=Accelerator.SIMULATED, is_released=is_released, now_ms=NOW_MS
        )
        await self._put_status(status)

    async def _put_status(self, status: SandboxStatus) -> None:
        await self._store.transact([], [Put(status_key(self.host_id, status.sandbox_id), encode(status))])

    async def _source_added(self, tenant: Tenant, digest: Digest) -> None:
        await self._store.transact([], [Put(source_key(tenant, digest_hex(digest), self.host_id), b"")])


class _CountedOutput(OutputService):
    """hostd's output service, with a count of the calls that are under way."""

    def __init__(self, owner: ObedientHost) -> None:
        super().__init__(owner.orders, owner.changes)
        self._owner = owner

    async def ReadOutput(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 (the stub's name)
        self._owner.output_calls += 1
        self._owner.output_requests.append(request)
        try:
            async for chunk in super().ReadOutput(request, context):
                yield chunk
        finally:
            self._owner.output_calls -= 1
