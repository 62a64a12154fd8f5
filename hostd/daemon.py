"""Puts the parts of hostd together and runs them. Decides nothing itself; the drivers are chosen by __main__."""

import asyncio
import datetime
from collections.abc import Coroutine, Mapping, Set
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import structlog

from bedplate.content.v1 import content_pb2_grpc
from bedplate.sandbox.v1 import event_pb2_grpc, network_pb2_grpc, service_pb2_grpc
from fleet.errors import BedplateError
from fleet.model.assignment import Assignment
from fleet.model.host import Accelerator, HostImage, HostRecord
from fleet.model.ids import Digest, HostId, SandboxId
from fleet.model.sandbox import Goal, NetworkMode
from fleet.revocation import Revocations
from fleet.server import STOP_GRACE_S, start_server
from fleet.store.keyspace import host_assignments
from fleet.store.mirror import Mirror
from fleet.store.port import Store
from fleet.store.revoked import follow_revocations
from hostd.api.changes import Changes
from hostd.api.content import ContentService, SourcesHeld
from hostd.api.events import EventService
from hostd.api.exec import ExecService
from hostd.api.network import NetworkService
from hostd.api.output import OutputService
from hostd.api.permissions import PERMISSIONS
from hostd.api.secrets import SecretService
from hostd.api.usage import UsageService
from hostd.clock import now_ms
from hostd.config import KILL, HostdConfig
from hostd.drivers.ports import Guard, GuestLinks
from hostd.fencing import Fence
from hostd.guard import boottime_ms
from hostd.intake import Intake
from hostd.inventory import read_boot_id, read_capacity, read_labels, read_numa_nodes, read_taints
from hostd.meter import MeterKeeper
from hostd.orders import Orders
from hostd.publish import Publisher
from hostd.reconcile.apply import Applier, Drivers, Images, Place
from hostd.reconcile.loop import Reconciler
from hostd.reconcile.session import Sessions
from hostd.registration import Registration
from hostd.renewal import Renewal
from hostd.room import Room
from hostd.sourcing import LocalSources, Sourcing
from hostd.traffic import Traffic

# What the record says is looked at again this often: images come and go, disks fill.
REFRESH_INTERVAL_S = 30.0
RETRY_S = 2.0
# One listing of the packet filter: 57 ms with 200 sandboxes, 14 ms of it hostd's own. So late a denial may be told.
DROPS_INTERVAL_S = 5.0
SCRATCH_DIR = "scratch"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Parts:
    """What __main__ chose for this host."""

    config: HostdConfig
    store: Store
    orders: Orders
    drivers: Drivers
    links: GuestLinks
    guard: Guard
    images: "TaggedImages"
    sources: "HeldSources"
    sourcing: Sourcing
    room: Room
    accelerator: Accelerator
    accelerator_reason: str


class TaggedImages(Images, Protocol):
    """Images that also list what may be asked for by name."""

    async def list_images(self, named: Set[Digest]) -> tuple[HostImage, ...]: ...


class HeldSources(SourcesHeld, LocalSources, Protocol):
    """A store of sources that takes, gives and makes disks."""


async def run_daemon(parts: Parts, stop: asyncio.Event) -> None:
    """Serves until `stop` is set; VMs run on. Raises what keeps the host from starting."""
    daemon = _Daemon(parts)
    await parts.drivers.network.ensure_bridge()
    server, port = await start_server(
        parts.config.listen, parts.config.tls, PERMISSIONS, daemon.register, daemon.revocations
    )
    address = parts.config.advertise or f"{parts.config.listen.rsplit(':', 1)[0]}:{port}"
    try:
        record = await daemon.describe(address)
        log.info("hostd.started", host_id=parts.config.host_id, address=address, accelerator=parts.accelerator)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(part) for part in daemon.parts(record, address)]
            await stop.wait()
            for task in running:
                task.cancel()
    finally:
        await server.stop(STOP_GRACE_S)
        log.info("hostd.stopped", host_id=parts.config.host_id)


class _Daemon:
    """The parts of one host, joined by nudges."""

    def __init__(self, parts: Parts) -> None:
        config, host_id = parts.config, HostId(parts.config.host_id)
        interface = config.network.interface()
        self._parts = parts
        self._changes = Changes()
        self.revocations = Revocations()
        self._renewal = Renewal(host_id, config.tls, config.schedulers, now)
        self._mirror = Mirror(parts.store, host_assignments(host_id))
        self._registration = Registration(parts.store, host_id, read_boot_id())
        prefix = interface.network.prefixlen
        self._sessions = sessions = Sessions(
            parts.orders,
            parts.links,
            self._on_progress,
            now_ms,
            prefix_length=prefix,
            counted=self._tell,
            may_begin=self._may_begin,
        )
        place = Place(config.run_dir, config.log_dir, prefix, parts.accelerator)
        self._traffic = traffic = Traffic(lambda sandbox_id: parts.orders.artifact_path(sandbox_id).parent, now_ms)
        traffic.on_append(self._changes.nudge)
        applier = Applier(parts.drivers, parts.orders, sessions, place, now_ms, on_port_removed=self._note_last_drops)
        self._reconciler = Reconciler(parts.orders, parts.drivers, applier, sessions, now_ms, bridge=interface)
        self._publisher = Publisher(host_id, parts.store, parts.orders, self._reconciler, parts.accelerator)
        self._publisher.on_told(self._on_told)
        self._intake = Intake(host_id, self._publisher.recall, self._mirror, parts.orders, self._reconciler)
        self._meter = MeterKeeper(
            host_id,
            parts.store,
            lambda: parts.orders.orders,
            config.state_dir,
            read_boot_id(),
            boottime_ms=boottime_ms,
        )
        self._fence = self._raise_fence() if config.fencing == KILL else None
        self._reconciler.on_pass(self._tell)
        self._reconciler.on_pass(self._measure)
        self._registration.on_registered(self._on_registered)
        parts.drivers.hypervisor.on_change(self._reconciler.nudge)

    def register(self, server: Any) -> None:
        """Adds the services to a server."""
        parts = self._parts
        content = ContentService(parts.orders, parts.sources, parts.sourcing.tell, parts.room.hold)
        service_pb2_grpc.add_OutputServiceServicer_to_server(OutputService(parts.orders, self._changes), server)
        service_pb2_grpc.add_ExecServiceServicer_to_server(ExecService(parts.orders, self._sessions), server)
        service_pb2_grpc.add_SecretServiceServicer_to_server(SecretService(parts.orders, self._sessions), server)
        content_pb2_grpc.add_ContentServiceServicer_to_server(content, server)
        usage = UsageService(
            HostId(parts.config.host_id),
            parts.orders,
            self._sessions,
            parts.drivers.hypervisor.measure,
            parts.drivers.disks.measure_scratch,
        )
        service_pb2_grpc.add_UsageServiceServicer_to_server(usage, server)
        event_pb2_grpc.add_EventServiceServicer_to_server(EventService(parts.orders.journal), server)
        network_pb2_grpc.add_NetworkServiceServicer_to_server(
            NetworkService(parts.orders, self._traffic, self._changes), server
        )

    def parts(self, record: HostRecord, address: str) -> list[Coroutine[Any, Any, None]]:
        """Everything that runs for as long as hostd does."""
        return [
            self._mirror.run(),
            self._intake.run(),
            self._reconciler.run(),
            self._publish(),
            self._meter.run(self._registration.fence),
            self._registration.run(record),
            self._tell_sources(),
            follow_revocations(self._parts.store, self.revocations),
            self._renewal.run(),
            self._refresh(address),
            self._watch_drops(),
            *([self._fence.run(), self._intake.settle(self._fence.orders_read)] if self._fence else ()),
        ]

    async def describe(self, address: str) -> HostRecord:
        """This host's record as of now."""
        config = self._parts.config
        inventory = config.inventory
        capacity = read_capacity(inventory.capacity, config.state_dir, config.state_dir / SCRATCH_DIR)
        return HostRecord(
            host_id=HostId(config.host_id),
            address=address,
            capacity=capacity,
            labels=read_labels(inventory),
            images=await self._parts.images.list_images(_named_images(self._parts.orders)),
            accelerator=self._parts.accelerator,
            accelerator_reason=self._parts.accelerator_reason,
            network_modes=(NetworkMode.NONE, NetworkMode.CLOSED),
            version=version("bedplate"),
            registered_at_ms=0,
            vcpu_overcommit_milli=round(inventory.vcpu_overcommit * 1000),
            numa_nodes=read_numa_nodes(capacity),
            taints=read_taints(inventory),
            is_fenced=config.fencing == KILL,
        )

    def _raise_fence(self) -> Fence:
        hypervisor = self._parts.drivers.hypervisor
        fence = Fence(self._parts.orders, hypervisor, self._parts.guard, boottime_ms, self._reconciler.nudge)
        self._reconciler.obey(fence)
        self._registration.on_renewed(fence.lease_renewed)
        return fence

    async def _publish(self) -> None:
        # What an earlier hostd has published goes only when the orders are known.
        await self._intake.has_taken.wait()
        await self._publisher.run(self._registration.fence)

    def _on_registered(self) -> None:
        if self._fence is not None:
            self._fence.lease_taken()
        else:
            # Only now: until the record says that these VMs are kept, they may be placed elsewhere.
            self._parts.guard.disarm()
        self._intake.note_registered()
        self._publisher.nudge()

    def _may_begin(self, sandbox_id: SandboxId) -> bool:
        # Nobody places anew what a host keeps.
        return self._fence is None or self._publisher.has_told_start(sandbox_id)

    def _on_told(self, sandbox_id: SandboxId) -> None:
        if self._sessions.awaits_word(sandbox_id):
            self._reconciler.nudge()

    def _on_progress(self) -> None:
        self._tell()
        self._reconciler.nudge()

    def _measure(self) -> None:
        if self._reconciler.observed is not None:
            self._meter.look(self._reconciler.observed.domains)

    def _tell(self) -> None:
        self._changes.nudge()
        self._publisher.nudge()

    async def _watch_drops(self) -> None:
        orders = self._parts.orders.orders
        while True:
            await asyncio.sleep(DROPS_INTERVAL_S)
            try:
                drops = await self._parts.drivers.network.list_drops()
                for sandbox_id, counted in drops.items():
                    if sandbox_id in orders:
                        self._traffic.note_drops(orders[sandbox_id], counted)
            except BedplateError as error:
                log.warning("traffic.unnoted", code=error.code, error=error.message)
            self._traffic.forget(orders.__contains__)

    def _note_last_drops(self, order: Assignment, drops: Mapping[str, int]) -> None:
        try:
            self._traffic.note_drops(order, drops, is_last=True)
        except BedplateError as error:
            # Evidence is lost and said to be; the sandbox ends all the same.
            log.error("traffic.unnoted", sandbox_id=order.sandbox_id, code=error.code, error=error.message)

    async def _tell_sources(self) -> None:
        while True:
            try:
                await self._parts.sourcing.tell_all()
            except BedplateError as error:
                log.warning("sources.untold", code=error.code, error=error.message)
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _refresh(self, address: str) -> None:
        while True:
            await asyncio.sleep(REFRESH_INTERVAL_S)
            try:
                await self._registration.update(await self.describe(address))
            except BedplateError as error:
                log.warning("host.unrefreshed", code=error.code, error=error.message)


def _named_images(orders: Orders) -> frozenset[Digest]:
    """The images that sandboxes here were or will be started from: a stopped one starts again on its own only."""
    return frozenset(order.image_digest for order in orders.orders.values() if order.goal is not Goal.REMOVE)


def now() -> datetime.datetime:
    """The wall clock, in UTC."""
    return datetime.datetime.now(datetime.UTC)
