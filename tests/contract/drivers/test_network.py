"""Every Network keeps the promises of hostd/drivers/ports.py: the simulated one, and the real one in private namespaces."""

import asyncio
import os
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Interface

import pytest

from fleet.errors import HostFaultError
from fleet.model.ids import SandboxId
from hostd.drivers.network import LinuxNetwork, NetworkSettings
from hostd.drivers.ports import Network
from hostd.drivers.simulated import PlannedFaults, SimulatedNetwork
from hostd.reconcile.state import ObservedNetwork, Port, mac_address


def make_port(letter: str, address: str) -> Port:
    return Port(SandboxId(letter * 12), mac_address(IPv4Address(address)), IPv4Address(address), 16)


A, B, C = make_port("a", "10.77.0.2"), make_port("b", "10.77.0.3"), make_port("c", "10.77.0.4")


def ports(*wanted: Port) -> ObservedNetwork:
    ids = frozenset(port.sandbox_id for port in wanted)
    return ObservedNetwork(ids, ids)


@pytest.fixture(params=["simulated", pytest.param("linux", marks=pytest.mark.root)])
async def network(request: pytest.FixtureRequest) -> AsyncIterator[Network]:
    """A network with its bridge; the real one only where the namespaces are private."""
    if request.param == "simulated":
        driver: Network = SimulatedNetwork()
    else:
        assert os.environ.get("BEDPLATE_PRIVATE") == "1", "this test changes the network: run it in private namespaces"
        settings = NetworkSettings("bedplate0", IPv4Interface("10.77.0.1/16"), tap_uid=64123, tap_gid=64123)
        driver = LinuxNetwork(settings)
    await driver.ensure_bridge()
    yield driver
    await driver.remove_bridge()


async def test_a_new_bridge_has_no_ports(network: Network) -> None:
    """Nothing is observed before anything is made."""
    assert await network.observe() == ports()


async def test_ensuring_twice_equals_once(network: Network) -> None:
    """A port that stands is ensured again without harm, also across another look at the bridge."""
    await network.ensure_port(A)
    await network.ensure_bridge()
    await network.ensure_port(A)
    assert await network.observe() == ports(A)


async def test_ports_are_independent(network: Network) -> None:
    """Removing one port leaves the other; removing it again, or one that never was, is no error."""
    await network.ensure_port(A)
    await network.ensure_port(B)
    for gone in (A, A, C):
        await network.remove_port(gone.sandbox_id)
    assert await network.observe() == ports(B)


async def test_workers_may_come_at_once(network: Network) -> None:
    """Ports that are made and removed at the same time do not disturb each other."""
    await network.ensure_port(A)
    async with asyncio.TaskGroup() as workers:
        workers.create_task(network.ensure_port(B))
        workers.create_task(network.remove_port(A.sandbox_id))
        workers.create_task(network.ensure_port(C))
        workers.create_task(network.ensure_bridge())
    assert await network.observe() == ports(B, C)


async def test_drops_are_counted_for_each_port(network: Network) -> None:
    """Each port has its counts, of 0 at first; one that is removed says its last ones, and again there are none to say."""
    await network.ensure_port(A)
    await network.ensure_port(B)
    drops = await network.list_drops()
    assert set(drops) == {A.sandbox_id, B.sandbox_id}
    assert not any(packets for counted in drops.values() for packets in counted.values())
    assert not any((await network.remove_port(A.sandbox_id)).values())
    assert await network.remove_port(A.sandbox_id) == {}
    assert set(await network.list_drops()) == {B.sandbox_id}


async def test_a_removed_port_can_come_back(network: Network) -> None:
    """An id and an address can be used again."""
    await network.ensure_port(A)
    await network.remove_port(A.sandbox_id)
    await network.ensure_port(A)
    assert await network.observe() == ports(A)


async def test_the_bridge_takes_everything_with_it(network: Network) -> None:
    """After remove_bridge nothing is observed; twice is as good as once, and the bridge can come back."""
    await network.ensure_port(A)
    await network.remove_bridge()
    await network.remove_bridge()
    assert await network.observe() == ports()
    await network.ensure_bridge()
    assert await network.observe() == ports()


async def test_a_planned_fault_leaves_half_a_port() -> None:
    """The simulated network can be cut short between rules and tap, and the next try heals it."""
    network = SimulatedNetwork(PlannedFaults({"tap": {1}}))
    with pytest.raises(HostFaultError) as caught:
        await network.ensure_port(A)
    assert caught.value.code == "tap_failed"
    assert await network.observe() == ObservedNetwork(frozenset(), frozenset({A.sandbox_id}))
    await network.ensure_port(A)
    assert await network.observe() == ports(A)
