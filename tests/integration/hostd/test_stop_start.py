"""A sandbox is stopped and started again: its disk, address and output stay, everything else is of the new run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet.errors import HostFaultError
from fleet.model.sandbox import AgentPhase, Goal, Phase
from hostd.drivers.ports import LinkMessage
from hostd.drivers.simulated import PlannedFaults, SimulatedLinks
from hostd.orders import Orders
from hostd.reconcile.loop import STOP_EXTRA_S
from hostd.reconcile.progress import POWEROFF_S_MAX
from tests.integration.hostd.parts import A, Hostd, Room

pytestmark = pytest.mark.timeout(60)


class Recorder(SimulatedLinks):
    """Notes what hostd sends, and keeps `poweroff` back when it is told to."""

    sent: list[LinkMessage]
    is_deaf = False

    async def send(self, sandbox_id: Any, message: LinkMessage) -> None:
        self.sent = [*getattr(self, "sent", []), message]
        if message.type != "poweroff" or not self.is_deaf:
            await super().send(sandbox_id, message)


@pytest.fixture
def room(tmp_path: Path) -> Room:
    """A machine room in which nothing fails."""
    return Room(tmp_path)


async def stop_it(room: Room, hostd: Hostd, generation: int = 2, run: int = 1) -> None:
    hostd.accept(room.order("sleep", goal=Goal.STOP, generation=generation, run=run))
    await hostd.until_phase(Phase.STOPPED)
    await hostd.until_released()
    await hostd.until(lambda: "released" in hostd.steps_taken())


async def test_the_disk_stays_and_a_new_run_begins(room: Room) -> None:
    """The guest is powered off before its VM is removed; the next run has the same disk and address, and output goes on."""
    async with Hostd(room, Recorder).running() as hostd:
        hostd.accept(room.order("sleep"))
        first = await hostd.until_phase(Phase.RUNNING)
        await stop_it(room, hostd)
        assert [message.type for message in hostd.links.sent][-1] == "poweroff"
        assert "disk_kept" in hostd.steps_taken()
        hostd.accept(room.order("sleep", generation=3, run=2))
        again = await hostd.until_phase(Phase.RUNNING)
        await hostd.until(lambda: hostd.status().agents[0].output_bytes == 10)
        assert (again.run, again.generation, again.address) == (2, 3, first.address)
        assert (again.artifact, again.reason, again.agents[0].phase) == (None, None, AgentPhase.RUNNING)
        assert hostd.output() == b"done\ndone\n"
        assert room.hypervisor.starts[A] == 2
        assert not hostd.orders.artifact_path(A).exists()
        await stop_it(room, hostd, generation=4, run=2)
        assert hostd.orders.progress[A].is_continued


async def test_a_restart_of_hostd_between_and_within_the_runs(room: Room) -> None:
    """What is counted of one run is never taken for the other's, also by a hostd that knows both only from its disk."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        await stop_it(room, hostd)
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep", generation=3, run=2))
        await hostd.until_phase(Phase.RUNNING)
        await hostd.until(lambda: hostd.status().agents[0].output_bytes == 10)
    async with Hostd(room).running() as hostd:
        assert hostd.status().agents[0].output_bytes == 10
        assert Orders(room.folder / "state").output_bytes(A, "agent-0") == 5
        await stop_it(room, hostd, generation=4, run=2)
        assert hostd.output() == b"done\ndone\n"


async def test_a_guest_that_does_not_power_off_is_cut_off(room: Room) -> None:
    """The wait has an end; the disk is kept all the same."""
    async with Hostd(room, Recorder).running() as hostd:
        Recorder.is_deaf = True
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        hostd.accept(room.order("sleep", goal=Goal.STOP, generation=2))
        await hostd.until_phase(Phase.STOPPED)
        await hostd.until_pass()
        assert (A in room.hypervisor.domains, "released" in hostd.steps_taken()) == (True, False)
        hostd.pass_time(POWEROFF_S_MAX + 1)
        await hostd.until_released()
        Recorder.is_deaf = False
        assert (A in room.hypervisor.domains, await room.disks.list_scratch()) == (False, {A})


async def test_a_hostd_that_comes_back_while_a_guest_powers_off(room: Room) -> None:
    """The link is taken up again, and the guest is told again."""
    async with Hostd(room, Recorder).running() as hostd:
        Recorder.is_deaf = True
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        hostd.accept(room.order("sleep", goal=Goal.STOP, generation=2))
        await hostd.until_phase(Phase.STOPPED)
    Recorder.is_deaf = False
    async with Hostd(room, Recorder).running() as hostd:
        await hostd.until_released()
        assert [message.type for message in hostd.links.sent] == ["poweroff"]


async def test_a_clock_that_is_set_cuts_no_stop_short(room: Room) -> None:
    """A host whose clock jumps by a day while a guest stops waits for it all the same: cut off, its changes would be lost."""

    class Deaf(SimulatedLinks):
        """Its guest never hears of a stop."""

        async def send(self, sandbox_id: Any, message: LinkMessage) -> None:
            if message.type != "stop":
                await super().send(sandbox_id, message)

    class Stepped(Hostd):
        """A host whose wall clock is set while its time goes on as ever."""

        step_ms = 0

        def now_ms(self) -> int:
            return super().now_ms() + self.step_ms

    async with Stepped(room, Deaf).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        hostd.accept(room.order("sleep", goal=Goal.STOP, generation=2))
        await hostd.until_pass()
        Stepped.step_ms = 24 * 3600 * 1000
        await hostd.until_pass()
        await hostd.until_pass()
        assert hostd.orders.progress[A].failure is None


async def test_a_forced_stop_may_be_started_too(room: Room) -> None:
    """A guest that never stops is cut off; what its disk holds is there for the next run."""

    class Deaf(SimulatedLinks):
        """Its guest never hears of a stop."""

        async def send(self, sandbox_id: Any, message: LinkMessage) -> None:
            if message.type != "stop":
                await super().send(sandbox_id, message)

    async with Hostd(room, Deaf).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        hostd.accept(room.order("sleep", goal=Goal.STOP, generation=2))
        await hostd.until_pass()
        hostd.pass_time(STOP_EXTRA_S + 31)
        status = await hostd.until_phase(Phase.STOPPED)
        assert status.reason is not None
        assert status.reason.code == "stop_forced"
        await hostd.until_released()
        assert await room.disks.list_scratch() == {A}
        hostd.accept(room.order("sleep", generation=3, run=2))
        assert (await hostd.until_phase(Phase.RUNNING)).reason is None


async def test_what_ended_by_itself_is_not_stopped(room: Room) -> None:
    """A stop that comes after the end changes neither phase nor disk: there is none."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("make"))
        await hostd.until_phase(Phase.COMPLETED)
        hostd.accept(room.order("make", goal=Goal.STOP, generation=2))
        await hostd.until_pass()
        await hostd.until_released()
        assert (hostd.status().phase, await room.disks.list_scratch()) == (Phase.COMPLETED, frozenset())


@pytest.mark.parametrize("step", ["scratch", "domain", "rules", "tap", "link"])
@pytest.mark.parametrize("number", [2, 3, 4])
async def test_a_fault_in_the_way_delays_and_no_more(tmp_path: Path, step: str, number: int) -> None:
    """Wherever stop or start fails once, it is done in the end, with one domain for each run that was not counted anew."""
    room = Room(tmp_path, PlannedFaults({step: {number}}))
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await until_phase_in_time(hostd, Phase.RUNNING)
        hostd.accept(room.order("sleep", goal=Goal.STOP, generation=2))
        await until_phase_in_time(hostd, Phase.STOPPED)
        await until_in_time(hostd)
        hostd.accept(room.order("sleep", generation=3, run=2))
        await until_phase_in_time(hostd, Phase.RUNNING)
        await hostd.until(lambda: hostd.status().agents[0].output_bytes == 10)
        assert (hostd.output(), room.hypervisor.starts[A]) == (b"done\ndone\n", 2)


async def until_phase_in_time(hostd: Hostd, phase: Phase) -> None:
    while hostd.status().phase is not phase:
        hostd.pass_time(1.1)
        await hostd.until_pass()


async def until_in_time(hostd: Hostd) -> None:
    while not hostd.reconciler.is_released(A):
        hostd.pass_time(1.1)
        await hostd.until_pass()


async def test_a_start_that_fails_leaves_the_disk(room: Room) -> None:
    """A further run that its host cannot begin costs nothing of what the run before left: it is stopped again, and says why."""
    image = room.folder / "images" / room.image.replace(":", "-")
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        await stop_it(room, hostd)
    shutil.move(image, room.folder / "aside")
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep", generation=3, run=2))
        await hostd.until(lambda: hostd.orders.progress[A].failure is not None)
        hostd.pass_time(60)
        await hostd.until_released()
        status = hostd.status()
        assert status.reason is not None
        assert (status.phase, status.run, status.reason.code) == (Phase.STOPPED, 2, "image_missing")
        assert await room.disks.list_scratch() == {A}
        shutil.move(room.folder / "aside", image)
        hostd.accept(room.order("sleep", generation=4, run=3))
        await hostd.until_phase(Phase.RUNNING)
        assert hostd.orders.progress[A].is_continued


class StoppedStart:
    """A start that fails while its sandbox is ordered to stop, a minute before that is known."""

    def __init__(self) -> None:
        self.stop: Callable[[], None] | None = None

    def strike(self, step: str, subject: str) -> None:
        if step == "domain_reply" and self.stop is not None:
            stop, self.stop = self.stop, None
            stop()
            raise HostFaultError("domain_failed", f"{subject}: planned to fail", "")


async def test_a_stop_that_comes_while_a_start_fails_is_kept(tmp_path: Path) -> None:
    """The start takes back that it was tried, and nothing of what the owner wished meanwhile."""
    faults = StoppedStart()
    room = Room(tmp_path, faults)
    hostd = Hostd(room)

    def stop() -> None:
        hostd.accept(room.order("sleep", goal=Goal.STOP, generation=2))
        room.now_s += 60

    faults.stop = stop
    began_ms = hostd.now_ms()
    async with hostd.running():
        hostd.accept(room.order("sleep"))
        await hostd.until(lambda: hostd.reconciler.trouble(A) is not None)
        hostd.pass_time(60)
        await hostd.until_phase(Phase.STOPPED)
        await hostd.until_released()
        assert hostd.orders.progress[A].stopping_since_ms == began_ms
