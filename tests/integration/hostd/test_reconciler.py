"""hostd from order to removal, with simulated drivers, real folders and a crash wherever one can be."""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.errors import HostFaultError
from fleet.model.ids import Digest, SandboxId
from fleet.model.sandbox import AgentPhase, Goal, NetworkMode, Phase, Reason, Source
from hostd.drivers.ports import LinkMessage
from hostd.drivers.simulated import PlannedFaults, SimulatedLinks
from hostd.drivers.simulated_guest import AgentScript
from hostd.reconcile.diff import VM_DIED, VM_UNSTARTABLE
from hostd.reconcile.loop import BACKOFF_S, START_ATTEMPTS_MAX, STOP_EXTRA_S, STOP_FORCED
from hostd.reconcile.patience import GUEST_SILENT, SILENCE_S_MAX
from hostd.reconcile.progress import STARTS_MAX
from hostd.reconcile.state import DomainState, Observed
from tests.integration.hostd.parts import A, B, Hostd, Room

# A test that waits for what never comes ends here.
pytestmark = pytest.mark.timeout(60)
STEPS = ("bridge", "rules", "tap", "scratch", "domain", "domain_reply", "link")
MUCH = bytes(range(256)) * 5_000


@pytest.fixture
def room(tmp_path: Path) -> Room:
    """A machine room in which nothing fails."""
    return Room(tmp_path)


async def assert_nothing_left(room: Room, hostd: Hostd, folders: frozenset[SandboxId] = frozenset()) -> None:
    assert hostd.orders.folders() == folders
    assert await room.observe(folders) == Observed(folders=folders)
    assert hostd.sessions.attached() == frozenset()
    assert list((room.folder / "run").iterdir()) == []


async def test_a_sandbox_runs_to_its_end(room: Room) -> None:
    """Output and artifact are kept, everything else is freed, and the stages tell the way."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order())
        status = await hostd.until_phase(Phase.COMPLETED)
        await hostd.until_released()
        assert (status.agents[0].exit_code, hostd.output()) == (0, b"done\n")
        assert status.artifact is not None
        assert hostd.orders.artifact_path(A).stat().st_size == status.artifact.size_bytes
        await hostd.until(lambda: "released" in hostd.steps_taken())
        assert hostd.steps_taken() == [
            *("image_verified", "disks_ready", "network_ready", "domain_started", "link_connected", "configured"),
            *("agents_started", "first_output", "agents_ended", "artifact_stored", "released"),
        ]
        await assert_nothing_left(room, hostd, frozenset({A}))


async def test_an_agent_that_fails(room: Room) -> None:
    """Exit code and reason reach the status; the other agent's end is its own, and its artifact still comes."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("exit 3", "make"))
        status = await hostd.until_phase(Phase.FAILED)
        assert [(agent.phase, agent.exit_code) for agent in status.agents] == [
            (AgentPhase.FAILED, 3),
            (AgentPhase.COMPLETED, 0),
        ]
        assert status.reason is not None
        assert (status.reason.code, "code 3" in status.reason.message) == ("agent_failed", True)
        assert status.artifact is not None
        await hostd.until_released()


async def test_a_sandbox_without_a_network(room: Room) -> None:
    """Mode none has no address, no tap and no rules at any moment."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep", mode=NetworkMode.NONE))
        await hostd.until_phase(Phase.RUNNING)
        observed = await room.observe(frozenset())
        assert (observed.network.taps | observed.network.chains, hostd.status().address) == (frozenset(), "")
        assert room.hypervisor.domains[A].machine.port is None


async def test_a_stop_and_then_a_removal(room: Room) -> None:
    """Stopping keeps results and disk, removing leaves nothing, and the order may then be forgotten."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        hostd.accept(room.order("sleep", goal=Goal.STOP, generation=2))
        status = await hostd.until_phase(Phase.STOPPED)
        assert (status.agents[0].signal, status.generation, hostd.output()) == (15, 2, b"done\n")
        await hostd.until_released()
        assert await room.observe(frozenset()) == Observed(scratch_disks=frozenset({A}))
        hostd.accept(room.order("sleep", goal=Goal.REMOVE, generation=3))
        await hostd.until_gone()
        await assert_nothing_left(room, hostd)
        hostd.orders.forget_order(A)
    assert Hostd(room).orders.orders == {}


async def test_a_removal_in_full_run(room: Room) -> None:
    """A running sandbox that is to go is gone at once, with its agents, output and console."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        (room.folder / "log" / f"{A}.console").touch()
        (room.folder / "log" / f"{A}.console.0").touch()
        (room.folder / "log" / f"{B}.console").touch()
        hostd.accept(room.order("sleep", goal=Goal.REMOVE))
        await hostd.until_gone()
        await assert_nothing_left(room, hostd)
        assert [path.name for path in (room.folder / "log").iterdir()] == [f"{B}.console"]


async def test_a_stop_before_the_start(room: Room) -> None:
    """A sandbox that is stopped before its agents could run never runs them."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order(goal=Goal.STOP))
        await hostd.until_phase(Phase.STOPPED)
        await hostd.until_released()
        assert room.hypervisor.starts == {}


async def test_an_order_that_vanishes_in_full_run(room: Room) -> None:
    """What nobody orders any more is removed wholly, and its neighbour runs on."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        hostd.accept(room.order("sleep", sandbox_id=B))
        await hostd.until_phase(Phase.RUNNING)
        await hostd.until_phase(Phase.RUNNING, B)
        hostd.orders.forget_order(A)
        hostd.reconciler.nudge()
        await hostd.until_gone()
        assert await room.hypervisor.list_domains() == {B: DomainState.RUNNING}


class Moment:
    """Does something in the middle of a step, once; nothing fails."""

    def __init__(self, step: str) -> None:
        self._step = step
        self.act: Callable[[], None] | None = None

    def strike(self, step: str, subject: str) -> None:
        if step == self._step and subject == A and self.act is not None:
            act, self.act = self.act, None
            act()


@pytest.mark.parametrize("step", STEPS[1:])
async def test_an_order_that_vanishes_in_the_middle_of_a_step(tmp_path: Path, step: str) -> None:
    """Nothing of it stays, and hostd goes on with the next order."""
    moment = Moment(step)
    room = Room(tmp_path, moment)
    async with Hostd(room).running() as hostd:
        moment.act = lambda: hostd.orders.forget_order(A)
        hostd.accept(room.order("sleep"))
        await hostd.until(lambda: moment.act is None)
        await hostd.until_gone()
        await assert_nothing_left(room, hostd)
        hostd.accept(room.order(sandbox_id=B))
        await hostd.until_phase(Phase.COMPLETED, B)


@pytest.mark.parametrize("step", STEPS[1:])
async def test_a_removal_in_the_middle_of_a_step(tmp_path: Path, step: str) -> None:
    """The same when it is ordered away: what the worker had yet to bring up, it leaves."""
    moment = Moment(step)
    room = Room(tmp_path, moment)
    async with Hostd(room).running() as hostd:
        moment.act = lambda: hostd.accept(room.order("sleep", goal=Goal.REMOVE, generation=2))
        hostd.accept(room.order("sleep"))
        await hostd.until(lambda: moment.act is None)
        await hostd.until_gone()
        await assert_nothing_left(room, hostd)


async def test_an_order_that_comes_back_while_it_is_cleared_away(tmp_path: Path) -> None:
    """An order lost and found again, in the middle of the removal, starts anew; it is not forgotten half taken."""
    moment = Moment("scratch")
    room = Room(tmp_path, moment)
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("exit 0"))
        await hostd.until(lambda: "domain_started" in hostd.steps_taken())
        moment.act = lambda: hostd.accept(room.order("exit 0", sandbox_id=A, generation=2))
        hostd.orders.forget_order(A)
        hostd.reconciler.nudge()
        await hostd.until(lambda: moment.act is None)
        await hostd.until(lambda: A in hostd.orders.orders and hostd.status().phase in (Phase.FAILED, Phase.COMPLETED))
        assert A in hostd.orders.progress


async def test_a_vm_that_dies_in_full_run(room: Room) -> None:
    """Its agents may have run: it fails with the reason, and no second VM is started."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        room.hypervisor.set_state(A, DomainState.DEAD)
        status = await hostd.until_phase(Phase.FAILED)
        await hostd.until_released()
        assert (status.reason, room.hypervisor.starts) == (VM_DIED, {A: 1})
        assert status.agents[0].phase is AgentPhase.FAILED


async def test_a_vm_that_never_comes_up(room: Room) -> None:
    """A VM that dies before its guest has spoken is started STARTS_MAX times, each time as a new machine, then no more."""
    generations = []

    def die(sandbox_id: SandboxId) -> None:
        domain = room.hypervisor.domains.get(sandbox_id)
        if domain is not None and domain.state is DomainState.RUNNING:
            generations.append(domain.machine.generation_id)
            domain.state = DomainState.DEAD

    room.hypervisor.watch(die)
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order())
        status = await hostd.until_phase(Phase.FAILED)
        await hostd.until_released()
        assert (status.reason, room.hypervisor.starts) == (VM_UNSTARTABLE, {A: STARTS_MAX})
        assert len(set(generations)) == STARTS_MAX


async def test_a_paused_vm_runs_on(room: Room) -> None:
    """What somebody paused is resumed, not started anew."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        room.hypervisor.set_state(A, DomainState.PAUSED)
        await hostd.until(lambda: room.hypervisor.domains[A].state is DomainState.RUNNING)
        assert room.hypervisor.starts == {A: 1}


async def test_a_silent_guest_is_given_up(room: Room) -> None:
    """A guest that has not spoken for SILENCE_S_MAX is gone, however its domain looks; a moment less is patience."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        await hostd.listen_for(SILENCE_S_MAX - 1)
        assert hostd.status().phase is Phase.RUNNING
        notice = hostd.reconciler.trouble(A)
        assert notice is not None
        assert (notice.code, "240 s" in notice.message) == ("guest_unresponsive", True)
        hostd.pass_time(2)
        status = await hostd.until_phase(Phase.FAILED)
        assert status.reason == GUEST_SILENT
        await hostd.until_released()


async def test_a_stop_that_takes_too_long_is_forced(tmp_path: Path) -> None:
    """A guest that does not end its agents is cut off after the longest grace period and STOP_EXTRA_S."""
    calls: dict[str, Collection[int]] = {"domain": ()}
    room = Room(tmp_path, PlannedFaults(calls))
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        # A paused VM that cannot be resumed hears nothing.
        calls["domain"] = range(1, 1_000)
        room.hypervisor.set_state(A, DomainState.PAUSED)
        hostd.accept(room.order("sleep", goal=Goal.STOP))
        await hostd.until(lambda: hostd.orders.progress[A].stopping_since_ms > 0)
        assert hostd.status().phase is Phase.RUNNING
        hostd.pass_time(30 + STOP_EXTRA_S + 1)
        status = await hostd.until_phase(Phase.STOPPED)
        assert status.reason == STOP_FORCED
        calls["domain"] = ()
        await hostd.until(lambda: hostd.reconciler.is_released(A) or skip_pause(hostd))


class OneWayLinks(SimulatedLinks):
    """The guest of A takes no byte any more once it is to stop."""

    async def send(self, sandbox_id: SandboxId, message: LinkMessage) -> None:
        if (sandbox_id, message.type) == (A, "stop"):
            await asyncio.Event().wait()
        await super().send(sandbox_id, message)


async def test_a_guest_that_does_not_read_delays_only_itself(room: Room) -> None:
    """While one guest is being waited for, another sandbox is stopped and a third is started."""
    async with Hostd(room, OneWayLinks).running() as hostd:
        for sandbox_id in (A, B):
            hostd.accept(room.order("sleep", sandbox_id=sandbox_id))
            await hostd.until_phase(Phase.RUNNING, sandbox_id)
        for sandbox_id in (A, B):
            hostd.accept(room.order("sleep", sandbox_id=sandbox_id, goal=Goal.STOP))
        await hostd.until_phase(Phase.STOPPED, B)
        third = SandboxId("c" * 12)
        hostd.accept(room.order(sandbox_id=third))
        await hostd.until_phase(Phase.COMPLETED, third)
        assert hostd.status().phase is Phase.RUNNING


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("call", range(1, 5))
async def test_a_step_that_fails_is_tried_again(tmp_path: Path, step: str, call: int) -> None:
    """Whichever step fails, also after half of it is done: after its pause it is done, and the result is the same."""
    room = Room(tmp_path, PlannedFaults({step: {call}}))
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order())
        await run_out(hostd, Phase.COMPLETED)
        assert hostd.output() == b"done\n"
        hostd.accept(room.order(goal=Goal.REMOVE))
        await remove(hostd)
        await assert_nothing_left(room, hostd)
        assert room.hypervisor.starts[A] == 1


async def run_out(hostd: Hostd, phase: Phase) -> None:
    """Waits for a phase; whenever something failed, its pause passes."""
    await hostd.until(lambda: hostd.status().phase is phase or skip_pause(hostd))


async def remove(hostd: Hostd) -> None:
    await hostd.until(
        lambda: (A not in hostd.orders.folders() and hostd.reconciler.is_released(A)) or skip_pause(hostd)
    )


def skip_pause(hostd: Hostd) -> bool:
    if hostd.reconciler.trouble(A) is not None:
        hostd.pass_time(max(BACKOFF_S))
    return False


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("call", range(1, 4))
async def test_a_crash_at_every_step_is_survived(tmp_path: Path, step: str, call: int) -> None:
    """hostd is killed where a step fails and started on the same disk and the same machine room: the sandbox completes, once."""
    room = Room(tmp_path, PlannedFaults({step: {call}}), behave=lambda agent: AgentScript(MUCH))
    async with Hostd(room).running() as first:
        first.accept(room.order())
        await first.until(lambda: first.reconciler.trouble(A) is not None or first.status().phase is Phase.COMPLETED)
    async with Hostd(room).running() as second:
        assert second.orders.orders == {A: room.order()}
        await run_out(second, Phase.COMPLETED)
        assert second.output() == MUCH
        assert room.hypervisor.starts[A] == 1
        second.accept(room.order(goal=Goal.REMOVE))
        await remove(second)
        await assert_nothing_left(room, second)


@pytest.mark.parametrize(
    "stage",
    [
        *("image_verified", "disks_ready", "network_ready", "domain_started", "link_connected", "configured"),
        *("agents_started", "first_output", "agents_ended"),
    ],
)
async def test_a_crash_after_every_stage_is_survived(tmp_path: Path, stage: str) -> None:
    """The same for every moment of a sandbox's life: adopted, resumed, complete, started once."""
    room = Room(tmp_path, behave=lambda agent: AgentScript(MUCH))
    async with Hostd(room).running() as first:
        first.accept(room.order())
        await first.until(lambda: stage in first.steps_taken())
    async with Hostd(room).running() as second:
        await second.until_phase(Phase.COMPLETED)
        await second.until_released()
        assert (second.output(), room.hypervisor.starts) == (MUCH, {A: 1})


async def test_a_crash_between_progress_and_order(room: Room) -> None:
    """Half taken over is not taken over: what was noted is cleared away, and the order can come again."""
    first = Hostd(room)
    first.accept(room.order())
    first.orders.forget_order(A)
    async with Hostd(room).running() as second:
        await second.until_gone()
        second.accept(room.order())
        await second.until_phase(Phase.COMPLETED)


async def test_an_image_that_is_corrupt_fails_at_once(room: Room) -> None:
    """Trying again heals no flipped byte: the first look says which file, and nothing is left."""
    path = room.folder / "images" / room.image.replace(":", "-") / "root.erofs"
    path.write_text("rooT")
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order())
        status = await hostd.until_phase(Phase.FAILED)
        assert status.reason is not None
        assert (status.reason.code, str(path) in status.reason.message) == ("image_corrupt", True)
        await hostd.until_released()
        assert room.hypervisor.starts == {}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"image_digest": Digest("sha256:" + "0" * 64)}, "image_missing"),
        ({"image_digest": Digest("../x")}, "image_missing"),
        ({"sources": Digest("sha256:" + "0" * 64)}, "source_unknown"),
    ],
)
async def test_what_is_not_there_fails_at_once(room: Room, change: dict[str, Digest], code: str) -> None:
    """An image or source that no host has will not come by waiting."""
    order = room.order()
    if "sources" in change:
        order = room.order(sources=(Source(change["sources"], 1, "/workspace"),))
    else:
        order = replace(order, image_digest=change["image_digest"])
    async with Hostd(room).running() as hostd:
        hostd.accept(order)
        status = await hostd.until_phase(Phase.FAILED)
        assert status.reason is not None
        assert status.reason.code == code
        await hostd.until_released()


class Always:
    """Fails a step every time, and counts."""

    def __init__(self, step: str) -> None:
        self._step = step
        self.tries = 0

    def strike(self, step: str, subject: str) -> None:
        if step == self._step:
            self.tries += 1
            raise HostFaultError("it_failed", f"{subject}: it fails", "mend it")


@pytest.mark.parametrize("step", ["rules", "scratch", "domain"])
async def test_a_host_that_keeps_failing(tmp_path: Path, step: str) -> None:
    """After START_ATTEMPTS_MAX tries with growing pauses the sandbox fails with what the host said, not with a guess."""
    faults = Always(step)
    room = Room(tmp_path, faults)
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order())
        for attempt, pause_s in enumerate(BACKOFF_S[: START_ATTEMPTS_MAX - 1], start=1):
            await hostd.until(lambda: hostd.reconciler.trouble(A) is not None)
            await hostd.until_pass()
            assert (faults.tries, hostd.status().phase) == (attempt, Phase.STARTING)
            hostd.pass_time(pause_s)
            await hostd.until(lambda attempt=attempt: faults.tries > attempt)
        status = await hostd.until_phase(Phase.FAILED)
        assert status.reason == Reason("it_failed", f"{A}: it fails", "mend it")
        assert faults.tries >= START_ATTEMPTS_MAX


async def test_a_retry_waits_for_its_time(tmp_path: Path) -> None:
    """Before the pause is over nothing is tried, however often hostd looks."""
    room = Room(tmp_path, PlannedFaults({"scratch": {1}}))
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order())
        await hostd.until(lambda: hostd.reconciler.trouble(A) is not None)
        hostd.pass_time(BACKOFF_S[0] / 2)
        await hostd.until_pass()
        assert hostd.steps_taken() == ["image_verified"]
        hostd.pass_time(BACKOFF_S[0] / 2)
        await hostd.until_phase(Phase.COMPLETED)


async def test_a_full_disk_stops_that_sandbox_only(room: Room) -> None:
    """State that cannot be written troubles the sandbox it belongs to; hostd and the neighbour go on."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order())
        # A folder in the place of the file: writing it fails as a broken disk would, also for root.
        (room.folder / "state/sandboxes" / A / ".progress.new").mkdir()
        hostd.accept(room.order(sandbox_id=B))
        await hostd.until_phase(Phase.COMPLETED, B)
        trouble = hostd.reconciler.trouble(A)
        assert trouble is not None
        assert trouble.code == "disk_failed"
        (room.folder / "state/sandboxes" / A / ".progress.new").rmdir()
        await run_out(hostd, Phase.COMPLETED)


async def test_released_is_said_by_a_fresh_look_only(tmp_path: Path) -> None:
    """A sandbox that failed while its VM was coming up is not called free before somebody has looked again."""
    room = Room(tmp_path, PlannedFaults({"domain_reply": range(1, 100)}))
    released_with_domain = []

    async with Hostd(room).running() as hostd:

        def check() -> None:
            if hostd.reconciler.is_released(A) and A in room.hypervisor.domains:
                released_with_domain.append(hostd.status())

        hostd.reconciler.on_pass(check)
        hostd.accept(room.order("sleep"))
        await run_out(hostd, Phase.RUNNING)
        hostd.accept(room.order("sleep", goal=Goal.REMOVE))
        await remove(hostd)
    assert released_with_domain == []
