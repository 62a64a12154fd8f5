"""How long hostd waits for its guests, by a clock that the tests move: whoever is late is told of, and then given up."""

from dataclasses import replace
from pathlib import Path

import pytest

from fleet.model.sandbox import AgentPhase, Phase
from hostd.drivers.ports import LinkMessage
from hostd.reconcile.loop import SILENCE_S_MAX
from hostd.reconcile.patience import OVERRUN_EXTRA_S, SECRETS_AWAITED, SECRETS_MISSING, SECRETS_S_MAX, UNRESPONSIVE_S
from tests.integration.hostd.parts import A, Hostd, Room

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
        hostd.pass_time(100 + 10 + OVERRUN_EXTRA_S)
        await hostd.until_pass()
        assert hostd.status().phase is Phase.RUNNING
        hostd.pass_time(2)
        status = await hostd.until_phase(Phase.FAILED)
        assert status.reason is not None
        assert (status.reason.code, status.agents[0].phase) == ("agent_overran", AgentPhase.FAILED)
        await hostd.until_released()


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
