"""How long hostd waits for its guests, by a clock that the tests move: whoever is late is told of, and then given up."""

from dataclasses import replace
from pathlib import Path

import pytest

from fleet.model.sandbox import AgentPhase, Phase
from hostd.drivers.ports import LinkMessage
from hostd.reconcile.patience import (
    ARTIFACT_STALLED,
    FINISH_S_MAX,
    OUTPUT_STALLED,
    OVERRUN_S_MAX,
    PACK_S_MAX,
    SECRETS_AWAITED,
    SECRETS_MISSING,
    SECRETS_S_MAX,
    SILENCE_S_MAX,
    STALL_S_MAX,
    UNRESPONSIVE_S,
)
from tests.integration.hostd.parts import A, Hostd, Room
from tests.integration.hostd.talk import Talk

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def room(tmp_path: Path) -> Room:
    """A host on which nothing runs yet."""
    return Room(tmp_path)


async def test_a_guest_that_is_heard_again_is_well(room: Room) -> None:
    """Quiet for a while it is unresponsive and runs on; the first word ends that, and begins the wait anew."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        await hostd.listen_for(UNRESPONSIVE_S - 1)
        assert hostd.reconciler.trouble(A) is None
        await hostd.listen_for(2)
        notice = hostd.reconciler.trouble(A)
        assert notice is not None
        assert notice.code == "guest_unresponsive"
        await hostd.sessions.receive(A, LinkMessage("heartbeat"))
        assert hostd.reconciler.trouble(A) is None
        await hostd.listen_for(SILENCE_S_MAX - 2)
        assert hostd.status().phase is Phase.RUNNING


async def test_a_host_that_was_stopped_blames_no_guest(room: Room) -> None:
    """Whoever heard nobody because it was stopped itself waits for every guest from now on."""
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        hostd.pass_time(10 * SILENCE_S_MAX)
        await hostd.until_pass()
        assert (hostd.status().phase, hostd.reconciler.trouble(A)) == (Phase.RUNNING, None)


async def test_an_agent_that_its_guest_does_not_end_fails(room: Room) -> None:
    """The guest is not trusted with a timeout: past it, with grace and patience, the host ends the sandbox."""
    order = room.order("sleep")
    (agent,) = order.spec.agents
    limited = replace(agent, timeout_s=100.0, grace_period_s=10.0)
    async with Hostd(room).running() as hostd:
        hostd.accept(replace(order, spec=replace(order.spec, agents=(limited,))))
        await hostd.until_phase(Phase.RUNNING)
        await hostd.listen_for(100 + 10 + OVERRUN_S_MAX)
        assert hostd.status().phase is Phase.RUNNING
        await hostd.listen_for(10)
        status = await hostd.until_phase(Phase.FAILED)
        assert status.reason is not None
        assert (status.reason.code, status.agents[0].phase) == ("agent_overran", AgentPhase.FAILED)
        await hostd.until_released()


async def test_an_agent_that_ended_in_time_is_heard_first(tmp_path: Path) -> None:
    """A hostd that was away for longer than a timeout learns from the guest how the agent ended, before it holds it to anything."""
    talk = Talk(tmp_path, timeout_s=100.0)
    await talk.run()
    talk.now_s += 3_600
    talk.start()
    assert talk.listen_for(OVERRUN_S_MAX - 5) is None
    await talk.greet(configured=True, agents={"one": {"state": "running"}, "two": {"state": "exited", "exit_code": 0}})
    late = talk.listen_for(15)
    assert late is not None
    assert (late.code, "agent one" in late.message) == ("agent_overran", True)


async def test_secrets_are_awaited(room: Room) -> None:
    """The guest is not configured before they are there; once they are it runs, and hostd holds them no more."""
    order = room.order("sleep")
    order = replace(order, spec=replace(order.spec, secrets=("API_KEY",)))
    async with Hostd(room).running() as hostd:
        hostd.accept(order)
        await hostd.until(lambda: "link_connected" in hostd.steps_taken())
        await hostd.until_pass()
        assert (hostd.status().phase, hostd.reconciler.trouble(A)) == (Phase.STARTING, SECRETS_AWAITED)
        await hostd.sessions.take_secrets(order, [("API_KEY", b"hunter2")])
        await hostd.until_phase(Phase.RUNNING)
        guest = room.hypervisor.domains[A].guest
        assert guest is not None
        assert (guest.secrets, hostd.reconciler.trouble(A)) == ({"API_KEY": b"hunter2"}, None)


async def test_secrets_are_not_awaited_for_ever(room: Room) -> None:
    """A VM that stands idle for want of them is ended."""
    order = room.order("sleep")
    async with Hostd(room).running() as hostd:
        hostd.accept(replace(order, spec=replace(order.spec, secrets=("API_KEY",))))
        await hostd.until(lambda: "link_connected" in hostd.steps_taken())
        for _ in range(int(SECRETS_S_MAX / 10)):
            await hostd.listen_for(10)
            # The guest beats while it waits.
            await hostd.sessions.receive(A, LinkMessage("heartbeat"))
        assert hostd.status().phase is Phase.STARTING
        hostd.pass_time(2)
        status = await hostd.until_phase(Phase.FAILED)
        assert status.reason == SECRETS_MISSING
        await hostd.until_released()


async def test_secrets_that_came_are_not_missed(tmp_path: Path) -> None:
    """Sent while the link was down, they are there when it is up again: the wait is over, also for a sandbox that runs for long."""
    talk = Talk(tmp_path, secrets=("API_KEY",))
    await talk.greet()
    await talk.say("disconnected")
    await talk.sessions.take_secrets(talk.orders.orders[A], [("API_KEY", b"hunter2")])
    assert talk.listen_for(SECRETS_S_MAX + 10) is None
    await talk.run()
    assert talk.listen_for(SECRETS_S_MAX + 10) is None


async def end_both(talk: Talk, final_bytes: int) -> None:
    await talk.run()
    for name in ("one", "two"):
        await talk.say("agent", name=name, state="exited", exit_code=0, offset=final_bytes if name == "one" else 0)


async def test_output_that_was_announced_and_never_comes(tmp_path: Path) -> None:
    """A final length that is a lie holds the sandbox for as long as nothing comes, and no longer; what came is kept."""
    talk = Talk(tmp_path)
    await end_both(talk, 100)
    assert talk.listen_for(STALL_S_MAX - 5) is None
    await talk.say("output", b"hello", agent="one", offset=0)
    assert talk.listen_for(STALL_S_MAX - 5) is None
    await talk.say("output", b"hello", agent="one", offset=0)
    assert talk.listen_for(15) == OUTPUT_STALLED
    assert talk.orders.output_path(A, "one").read_bytes() == b"hello"


async def test_a_trickle_ends_as_well(tmp_path: Path) -> None:
    """A byte now and then is progress each time, and does not hold a VM for ever."""
    talk = Talk(tmp_path)
    await end_both(talk, 10_000)
    for offset in range(int(FINISH_S_MAX / 100) - 1):
        await talk.say("output", b"x", agent="one", offset=offset)
        assert talk.listen_for(100) is None
    await talk.say("output", b"x", agent="one", offset=int(FINISH_S_MAX / 100) - 1)
    assert talk.listen_for(110) == OUTPUT_STALLED


async def test_an_artifact_that_does_not_come(tmp_path: Path) -> None:
    """Packing has its time; once it has begun to come it must go on, and the same bytes again are no progress."""
    talk = Talk(tmp_path)
    await end_both(talk, 0)
    assert talk.sent()[-1] == "collect"
    assert talk.listen_for(PACK_S_MAX - 10) is None
    about = {"size": 100, "digest": "sha256:" + "0" * 64, "changes": 0}
    await talk.say("artifact", b"x" * 50, offset=0, **about)
    assert talk.listen_for(STALL_S_MAX - 5) is None
    await talk.greet(configured=True)
    await talk.say("artifact", b"x", offset=49, **about)
    assert talk.listen_for(15) == ARTIFACT_STALLED


async def test_agents_that_run_owe_nothing(tmp_path: Path) -> None:
    """No agent is given up for being silent: without a timeout it may run for ever."""
    talk = Talk(tmp_path)
    await talk.run()
    await talk.say("agent", name="one", state="exited", exit_code=0, offset=100)
    assert talk.listen_for(FINISH_S_MAX * 2) is None
