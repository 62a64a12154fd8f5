"""Every Hypervisor and every Disks keeps the promises of hostd/drivers/ports.py. The real ones join as further params."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from fleet.errors import HostFaultError
from fleet.model.host import Accelerator
from fleet.model.ids import Digest, SandboxId
from hostd.drivers.ports import Disks, Hypervisor
from hostd.drivers.simulated import PlannedFaults, SimulatedDisks, SimulatedHypervisor
from hostd.reconcile.state import BootFiles, DomainState, Machine

A, B = SandboxId("aaaaaaaaaaaa"), SandboxId("bbbbbbbbbbbb")


@pytest.fixture(params=["simulated"])
async def hypervisor(request: pytest.FixtureRequest) -> AsyncIterator[Hypervisor]:
    """A hypervisor without domains; those of the test are gone afterwards."""
    driver = SimulatedHypervisor()
    yield driver
    for sandbox_id in tuple(await driver.list_domains()):
        await driver.remove_domain(sandbox_id)
    await driver.close()


@pytest.fixture(params=["simulated"])
def disks(request: pytest.FixtureRequest) -> Disks:
    """Disks without any."""
    return SimulatedDisks()


@pytest.fixture
def machine() -> Machine:
    """A machine that the hypervisor under test can start."""
    return Machine(
        sandbox_id=A,
        tenant="acme",
        vcpus=1,
        memory_mib=256,
        overhead_mib=256,
        accelerator=Accelerator.SIMULATED,
        boot=BootFiles(Digest("sha256:" + "0" * 64), "/boot/kernel", "/boot/initramfs", "/boot/root", "quiet"),
        scratch_path="/scratch/a.raw",
        link_path="/run/a.link",
        console_path="/log/a.console",
        generation_id="5a2b6f0e-1c55-4b0e-9a39-1f4a9d6f4a11",
    )


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
    await hypervisor.ensure_domain(replace(machine, sandbox_id=B))
    await hypervisor.remove_domain(A)
    await hypervisor.remove_domain(A)
    assert await hypervisor.list_domains() == {B: DomainState.RUNNING}


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
    await disks.remove_scratch(A)
    await disks.remove_scratch(A)
    assert await disks.list_scratch() == frozenset()
