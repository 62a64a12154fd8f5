"""Carries out actions, one after the other for each sandbox, and says what went wrong. Decides nothing."""

import shutil
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

from fleet.errors import HostFaultError
from fleet.model.assignment import Assignment
from fleet.model.host import Accelerator
from fleet.model.ids import Digest, SandboxId, Tenant
from fleet.model.sandbox import NetworkMode, StageName
from hostd.drivers.ports import Disks, Hypervisor, Network
from hostd.files import remove_durable
from hostd.orders import Orders
from hostd.reconcile.diff import Action, Step
from hostd.reconcile.progress import Progress, begin_run, fail, is_run_due, reach_stage
from hostd.reconcile.session import Sessions
from hostd.reconcile.state import BootFiles, Machine, Port, SourceDisk, mac_address


class Images(Protocol):
    """Where verified images come from."""

    async def ensure_image(self, digest: Digest) -> BootFiles: ...


class Sources(Protocol):
    """Where source disks come from; fetches from another host what this one lacks."""

    async def ensure_disk(self, tenant: Tenant, digest: Digest) -> str: ...


@dataclass(frozen=True, slots=True)
class Drivers:
    """All that actions act through."""

    hypervisor: Hypervisor
    network: Network
    disks: Disks
    images: Images
    sources: Sources


@dataclass(frozen=True, slots=True)
class Place:
    """Where on this host things are put, and what VMs run on."""

    run_dir: Path
    log_dir: Path
    prefix_length: int
    accelerator: Accelerator


@dataclass(frozen=True, slots=True)
class _Disks:
    """What a domain boots from and works on, verified."""

    boot: BootFiles
    sources: tuple[SourceDisk, ...]
    scratch_path: str


class Applier:
    """Runs the actions of one sandbox in order. Every step may be cut short anywhere and run again."""

    def __init__(
        self,
        drivers: Drivers,
        orders: Orders,
        sessions: Sessions,
        place: Place,
        now_ms: Callable[[], int],
        *,
        on_port_removed: Callable[[Assignment, Mapping[str, int]], None] = lambda _order, _drops: None,
    ) -> None:
        self._on_port_removed = on_port_removed
        self._drivers = drivers
        self._orders = orders
        self._sessions = sessions
        self._place = place
        self._now_ms = now_ms
        # What ENSURE_DISKS has just verified, for the domain that it is for.
        self._disks: dict[SandboxId, _Disks] = {}
        self._steps: dict[Step, Callable[[Action], Awaitable[None]]] = {
            Step.ENSURE_DISKS: self._ensure_disks,
            Step.ENSURE_PORT: self._ensure_port,
            Step.ENSURE_DOMAIN: self._ensure_domain,
            Step.RESUME_DOMAIN: self._resume_domain,
            Step.ATTACH_LINK: self._attach_link,
            Step.FAIL: self._fail,
            Step.DETACH_LINK: self._detach_link,
            Step.REMOVE_DOMAIN: self._remove_domain,
            Step.REMOVE_PORT: self._remove_port,
            Step.REMOVE_SCRATCH: self._remove_scratch,
            Step.REMOVE_FOLDER: self._remove_folder,
            Step.KEEP_SCRATCH: self._keep_scratch,
            Step.BEGIN_RUN: self._begin_run,
        }

    async def apply(self, action: Action) -> None:
        """Carries out one action; raises a BedplateError naming the step when the host fails at it."""
        await self._steps[action.step](action)

    def link_path(self, sandbox_id: SandboxId) -> Path:
        """The unix socket of a sandbox's guest link."""
        return self._place.run_dir / f"{sandbox_id}.link"

    async def _ensure_disks(self, action: Action) -> None:
        order = self._orders.orders[action.sandbox_id]
        boot = await self._drivers.images.ensure_image(order.image_digest)
        self._reach(action.sandbox_id, StageName.IMAGE_VERIFIED)
        self._disks[action.sandbox_id] = await self._find_disks(order, boot)
        self._reach(action.sandbox_id, StageName.DISKS_READY)

    async def _ensure_port(self, action: Action) -> None:
        port = self._port(self._orders.orders[action.sandbox_id])
        assert port is not None
        await self._drivers.network.ensure_port(port)
        self._reach(action.sandbox_id, StageName.NETWORK_READY)

    async def _ensure_domain(self, action: Action) -> None:
        order, progress = self._orders.orders[action.sandbox_id], self._orders.progress[action.sandbox_id]
        # Counted before it is tried; each try is a new machine to its guest (vmgenid).
        counted = replace(progress, starts=progress.starts + 1, generation_id=str(uuid.uuid4()))
        disks = self._disks.pop(action.sandbox_id, None)
        machine = self._machine(order, counted, disks or await self._find_disks(order))
        self._orders.put_progress(counted)
        try:
            await self._drivers.hypervisor.ensure_domain(machine)
        except HostFaultError:
            # The host failed, not the VM: the loop counts such tries, and fails the sandbox with what the host said.
            # What else has become of it meanwhile (a stop) stays.
            self._orders.put_progress(replace(self._orders.progress[action.sandbox_id], starts=progress.starts))
            raise
        self._reach(action.sandbox_id, StageName.DOMAIN_STARTED)

    async def _resume_domain(self, action: Action) -> None:
        order, progress = self._orders.orders[action.sandbox_id], self._orders.progress[action.sandbox_id]
        machine = self._machine(order, progress, await self._find_disks(order))
        await self._drivers.hypervisor.ensure_domain(machine)

    async def _attach_link(self, action: Action) -> None:
        self._sessions.attach(action.sandbox_id, str(self.link_path(action.sandbox_id)))

    async def _fail(self, action: Action) -> None:
        assert action.reason is not None
        self._orders.put_progress(fail(self._orders.progress[action.sandbox_id], action.reason))

    async def _detach_link(self, action: Action) -> None:
        await self._sessions.detach(action.sandbox_id)

    async def _remove_domain(self, action: Action) -> None:
        await self._drivers.hypervisor.remove_domain(action.sandbox_id)
        self.link_path(action.sandbox_id).unlink(missing_ok=True)

    async def _remove_port(self, action: Action) -> None:
        drops = await self._drivers.network.remove_port(action.sandbox_id)
        order = self._orders.orders.get(action.sandbox_id)
        if order is not None:
            self._on_port_removed(order, drops)

    async def _remove_scratch(self, action: Action) -> None:
        await self._drivers.disks.remove_scratch(action.sandbox_id)

    async def _keep_scratch(self, action: Action) -> None:
        await self._drivers.disks.keep_scratch(action.sandbox_id)
        self._reach(action.sandbox_id, StageName.DISK_KEPT)

    async def _begin_run(self, action: Action) -> None:
        order, progress = self._orders.orders[action.sandbox_id], self._orders.progress[action.sandbox_id]
        if is_run_due(progress, order):
            # Before the progress: a half artifact of one run must not be gone on with in the next.
            remove_durable(self._orders.artifact_path(action.sandbox_id))
            remove_durable(self._orders.partial_artifact_path(action.sandbox_id))
            self._orders.put_progress(begin_run(progress, order))

    async def _remove_folder(self, action: Action) -> None:
        self._orders.remove_folder(action.sandbox_id)
        for path in self._place.log_dir.glob(f"{action.sandbox_id}.console*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self._place.run_dir / action.sandbox_id, ignore_errors=True)

    async def _find_disks(self, order: Assignment, boot: BootFiles | None = None) -> "_Disks":
        """All that the domain's disks are, verified now."""
        boot = boot or await self._drivers.images.ensure_image(order.image_digest)
        sources = []
        for index, source in enumerate(order.spec.sources):
            path = await self._drivers.sources.ensure_disk(order.tenant, source.digest)
            sources.append(SourceDisk(f"source-{index}", path))
        scratch = await self._drivers.disks.ensure_scratch(order.sandbox_id, order.spec.resources.disk_mib)
        return _Disks(boot, tuple(sources), scratch)

    def _machine(self, order: Assignment, progress: Progress, disks: "_Disks") -> Machine:
        sandbox_id = order.sandbox_id
        resources = order.spec.resources
        return Machine(
            sandbox_id=sandbox_id,
            tenant=order.tenant,
            vcpus=resources.vcpus,
            memory_mib=resources.memory_mib,
            overhead_mib=order.overhead_mib,
            accelerator=self._place.accelerator,
            boot=disks.boot,
            scratch_path=disks.scratch_path,
            link_path=str(self.link_path(sandbox_id)),
            console_path=str(self._place.log_dir / f"{sandbox_id}.console"),
            generation_id=progress.generation_id,
            source_disks=disks.sources,
            port=self._port(order),
        )

    def _port(self, order: Assignment) -> Port | None:
        progress = self._orders.progress[order.sandbox_id]
        if order.spec.network.mode is NetworkMode.NONE or not progress.address:
            return None
        address = IPv4Address(progress.address)
        return Port(order.sandbox_id, mac_address(address), address, self._place.prefix_length)

    def _reach(self, sandbox_id: SandboxId, stage: StageName) -> None:
        progress = self._orders.progress.get(sandbox_id)
        if progress is not None:
            self._orders.put_progress(reach_stage(progress, stage, self._now_ms()))
