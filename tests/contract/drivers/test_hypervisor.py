"""Every Hypervisor and every Disks keeps the promises of hostd/drivers/ports.py: the simulated ones, libvirt and real files."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.errors import HostFaultError
from fleet.model.host import Accelerator
from fleet.model.ids import Digest, SandboxId
from hostd.drivers.domain_xml import QemuUser
from hostd.drivers.image import ImageStore, ScratchDisks
from hostd.drivers.ports import Disks, Hypervisor
from hostd.drivers.simulated import PlannedFaults, SimulatedDisks, SimulatedHypervisor
from hostd.guard import find_vms
from hostd.reconcile.state import BootFiles, DomainState, Machine
from provisioning.embedded.libvirt import QEMU_ID

HANG_S = 40.0
A, B = SandboxId("aaaaaaaaaaaa"), SandboxId("bbbbbbbbbbbb")


CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))
USER = QemuUser(QEMU_ID, QEMU_ID)
ROOM = ["simulated", pytest.param("libvirt", marks=[pytest.mark.root, pytest.mark.vm])]


@pytest.fixture(params=ROOM)
async def hypervisor(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Hypervisor]:
    """A hypervisor without domains; those of the test are gone afterwards."""
    driver: Hypervisor = SimulatedHypervisor()
    if request.param == "libvirt":
        # Not above: the fast part runs where libvirt's binding is not installed.
        from hostd.drivers.hypervisor import AcceleratorProbe, LibvirtHypervisor  # noqa: PLC0415

        boot = await ImageStore(CACHE / "images").ensure_image(request.getfixturevalue("image_digest"))
        probe = AcceleratorProbe(USER, tmp_path / "accelerator.json", _always(boot))
        driver = LibvirtHypervisor(request.getfixturevalue("libvirt_uri"), USER, probe)
    yield driver
    for sandbox_id in tuple(await driver.list_domains()):
        await driver.remove_domain(sandbox_id)
    await driver.close()


@pytest.fixture(params=["simulated", pytest.param("files", marks=pytest.mark.root)])
def disks(request: pytest.FixtureRequest, tmp_path: Path) -> Disks:
    """Disks without any."""
    return SimulatedDisks() if request.param == "simulated" else ScratchDisks(tmp_path / "scratch", (QEMU_ID, QEMU_ID))


@pytest.fixture
async def machine(request: pytest.FixtureRequest) -> Machine:
    """A machine that the hypervisor under test can start."""
    described = Machine(
        sandbox_id=A,
        tenant="acme",
        vcpus=1,
        memory_mib=256,
        overhead_mib=512,
        accelerator=Accelerator.SIMULATED,
        boot=BootFiles(Digest("sha256:" + "0" * 64), "/boot/kernel", "/boot/initramfs", "/boot/root", "quiet"),
        scratch_path="/scratch/a.raw",
        link_path="/run/a.link",
        console_path="/log/a.console",
        generation_id="5a2b6f0e-1c55-4b0e-9a39-1f4a9d6f4a11",
    )
    if "[libvirt]" not in request.node.name:
        return described
    folder: Path = request.getfixturevalue("qemu_folder")
    return replace(
        described,
        accelerator=Accelerator.TCG,
        boot=await ImageStore(CACHE / "images").ensure_image(request.getfixturevalue("image_digest")),
        scratch_path=await ScratchDisks(folder / "scratch", (QEMU_ID, QEMU_ID)).ensure_scratch(A, 64),
        link_path=str(folder / "a.link"),
        console_path=str(folder / "a.console"),
    )


async def beside(machine: Machine) -> Machine:
    """A second machine, with files of its own."""
    scratch_path = machine.scratch_path.replace(A, B)
    if machine.accelerator is Accelerator.TCG:
        scratch_path = await ScratchDisks(Path(machine.scratch_path).parent, (QEMU_ID, QEMU_ID)).ensure_scratch(B, 64)
    return replace(
        machine,
        sandbox_id=B,
        scratch_path=scratch_path,
        generation_id="6b3c7f1f-2d66-4c1f-8b4a-2f5b0e7f5b22",
        link_path=machine.link_path + "-b",
        console_path=machine.console_path + "-b",
    )


def _always(boot: BootFiles) -> Callable[[], Awaitable[BootFiles | None]]:
    async def find() -> BootFiles | None:
        return boot

    return find


async def test_a_probe_gives_its_reason(hypervisor: Hypervisor) -> None:
    """The accelerator comes with a sentence that an operator can act on."""
    accelerator, reason = await hypervisor.probe_accelerator()
    assert accelerator in Accelerator
    assert reason


async def test_a_domain_starts_once(hypervisor: Hypervisor, machine: Machine) -> None:
    """A second ensure, even of a changed machine, touches nothing."""
    await hypervisor.ensure_domain(machine)
    await hypervisor.ensure_domain(replace(machine, vcpus=2))
    assert await hypervisor.list_domains() == {A: DomainState.RUNNING}


async def test_a_removed_domain_is_forgotten(hypervisor: Hypervisor, machine: Machine) -> None:
    """Removal leaves nothing, is no error when there is nothing, and spares the others."""
    await hypervisor.ensure_domain(machine)
    await hypervisor.ensure_domain(await beside(machine))
    await hypervisor.remove_domain(A)
    await hypervisor.remove_domain(A)
    assert await hypervisor.list_domains() == {B: DomainState.RUNNING}


async def test_a_paused_domain_runs_on_when_it_is_ensured(hypervisor: Hypervisor, machine: Machine) -> None:
    """Pausing may be repeated and needs no domain; ensuring it lets it run on, and removal ends it paused as well."""
    await hypervisor.pause_domain(A)
    await hypervisor.ensure_domain(machine)
    for _ in range(2):
        await hypervisor.pause_domain(A)
        assert await hypervisor.list_domains() == {A: DomainState.PAUSED}
    await hypervisor.ensure_domain(machine)
    assert await hypervisor.list_domains() == {A: DomainState.RUNNING}
    await hypervisor.pause_domain(A)
    await hypervisor.remove_domain(A)
    assert await hypervisor.list_domains() == {}


async def test_no_domain_runs_past_a_shut_gate(hypervisor: Hypervisor, machine: Machine) -> None:
    """What begins or would run on while the gate is shut is there, paused, and runs once it is open."""
    is_open = False
    hypervisor.set_gate(lambda: is_open)
    for _ in range(2):
        await hypervisor.ensure_domain(machine)
        assert await hypervisor.list_domains() == {A: DomainState.PAUSED}
    is_open = True
    await hypervisor.ensure_domain(machine)
    assert await hypervisor.list_domains() == {A: DomainState.RUNNING}


@pytest.mark.root
@pytest.mark.vm
@pytest.mark.parametrize("hypervisor", ["libvirt"], indirect=True)
async def test_a_vm_that_hangs_holds_up_no_other(hypervisor: Hypervisor, machine: Machine) -> None:
    """QEMU that does not answer is told of and left; its neighbour pauses, and removal ends the one that hangs."""
    await hypervisor.ensure_domain(machine)
    await hypervisor.ensure_domain(await beside(machine))
    (pid,) = find_vms({A})
    os.kill(pid, signal.SIGSTOP)
    for _ in range(2):
        with pytest.raises(HostFaultError) as caught:
            await hypervisor.pause_domain(A)
        assert caught.value.code == "domain_unpaused"
    async with asyncio.timeout(HANG_S):
        while (await hypervisor.list_domains())[B] is not DomainState.PAUSED:
            # On a machine that is busy it may be told of as well; what was begun goes on.
            with suppress(HostFaultError):
                await hypervisor.pause_domain(B)
    await hypervisor.remove_domain(A)
    assert await hypervisor.list_domains() == {B: DomainState.PAUSED}


async def test_what_runs_is_measured(hypervisor: Hypervisor, machine: Machine) -> None:
    """Every VM and nothing else, each with the memory that it holds."""
    assert await hypervisor.measure() == {}
    await hypervisor.ensure_domain(machine)
    measured = await hypervisor.measure()
    assert set(measured) == {A}
    assert measured[A].memory_mib > 0
    assert measured[A].cpu_ms >= 0


async def test_every_change_nudges(hypervisor: Hypervisor, machine: Machine) -> None:
    """Whoever asked hears of a start and of an end."""
    nudges: list[str] = []
    hypervisor.on_change(lambda: nudges.append("look"))
    await hypervisor.ensure_domain(machine)
    heard_of_start = len(nudges)
    await hypervisor.remove_domain(A)
    assert 0 < heard_of_start < len(nudges)


async def test_a_machine_room_outlives_hostd(machine: Machine) -> None:
    """Letting go of the simulated domains ends none: the next hostd finds them, and does not start them again."""
    room = SimulatedHypervisor()
    await room.ensure_domain(machine)
    await room.close()
    await room.ensure_domain(machine)
    assert await room.list_domains() == {A: DomainState.RUNNING}
    assert room.starts == {A: 1}


async def test_a_lost_reply_is_no_second_start(machine: Machine) -> None:
    """A start that succeeded although it looked failed is found by the next try."""
    room = SimulatedHypervisor(PlannedFaults({"domain_reply": {1}}))
    with pytest.raises(HostFaultError):
        await room.ensure_domain(machine)
    await room.ensure_domain(machine)
    assert room.starts == {A: 1}


async def test_disks_are_made_once_and_removed(disks: Disks) -> None:
    """A disk keeps its absolute path, is listed while it exists, and removal may be repeated."""
    path = await disks.ensure_scratch(A, 64)
    assert path.startswith("/")
    assert await disks.ensure_scratch(A, 64) == path
    assert await disks.list_scratch() == {A}
    assert set(await disks.measure_scratch()) == {A}
    assert (await disks.measure_scratch())[A] <= 64
    await disks.keep_scratch(A)
    await disks.remove_scratch(A)
    await disks.remove_scratch(A)
    await disks.keep_scratch(A)
    assert await disks.list_scratch() == frozenset()
