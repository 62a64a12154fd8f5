"""Whatever was cut short, deleted or changed on the host, the driver's next call makes whole, and removal leaves nothing."""

import re
import subprocess
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface

import pytest

from fleet.errors import HostFaultError
from fleet.model.ids import SandboxId
from hostd.drivers.network import LinuxNetwork, NetworkSettings
from hostd.reconcile.state import ObservedNetwork, Port, mac_address

pytestmark = pytest.mark.root

ADDRESS = IPv4Address("10.77.0.2")
PORT = Port(SandboxId("aaaaaaaaaaaa"), mac_address(ADDRESS), ADDRESS, 16)
BOTH = ObservedNetwork(frozenset({PORT.sandbox_id}), frozenset({PORT.sandbox_id}))


def run(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


def describe_host() -> str:
    """Everything that this driver may touch."""
    return "".join(run(command) for command in ("ip -br link", "ip -br addr", "ip neigh", "nft list ruleset"))


async def test_a_port_is_as_promised(network: LinuxNetwork, settings: NetworkSettings) -> None:
    """A tap belongs to QEMU's user, is isolated and silent, its neighbours are static, and IPv6 is off on it and on the bridge."""
    await network.ensure_port(PORT)
    options = run(f"ip -d link show dev {PORT.tap}")
    for wanted in ("isolated on", "locked on", "learning off", "flood off", "mcast_flood off", "bcast_flood off"):
        assert f" {wanted} " in options
    assert f" user {settings.tap_uid} group {settings.tap_gid} " in options
    assert f"{PORT.mac} dev {PORT.tap} master {settings.bridge} static" in run("bridge fdb")
    assert f"{ADDRESS} dev {settings.bridge} lladdr {PORT.mac} PERMANENT" in run("ip neigh")
    for device in (PORT.tap, settings.bridge):
        assert run(f"cat /proc/sys/net/ipv6/conf/{device}/disable_ipv6").strip() == "1"
    assert "stp_state 0" in run(f"ip -d link show dev {settings.bridge}")


async def test_ensuring_twice_changes_nothing(network: LinuxNetwork) -> None:
    """A second ensure writes no rule: counters and handles of rules stay."""
    await network.ensure_port(PORT)
    rules = run("nft -a list ruleset")
    await network.ensure_bridge()
    await network.ensure_port(PORT)
    assert run("nft -a list ruleset") == rules


@pytest.mark.parametrize(
    "damage",
    [
        "nft flush ruleset",
        "nft delete table inet bedplate",
        "nft flush chain bridge bedplate prerouting",
        "nft flush chain bridge bedplate sandbox-aaaaaaaaaaaa",
        "nft delete element bridge bedplate taps { bp-aaaaaaaaaaaa }",
        "nft insert rule bridge bedplate prerouting accept",
        "nft add chain bridge bedplate prerouting { policy drop ; }",
        "ip link del bp-aaaaaaaaaaaa",
        "ip link del bedplate0",
        "ip link set bp-aaaaaaaaaaaa nomaster",
        "ip link set bp-aaaaaaaaaaaa down",
        "bridge link set dev bp-aaaaaaaaaaaa isolated off",
        "bridge link set dev bp-aaaaaaaaaaaa learning on",
        "ip addr flush dev bedplate0",
    ],
)
async def test_damage_is_mended(network: LinuxNetwork, damage: str) -> None:
    """After any damage the port looks unfinished or the bridge's check mends it, and then all is as it was."""
    await network.ensure_port(PORT)
    whole = describe_host()
    run(damage)
    await network.ensure_bridge()
    if await network.observe() != BOTH:
        await network.ensure_port(PORT)
    assert await network.observe() == BOTH
    assert _without_hardware(describe_host()) == _without_hardware(whole)


async def test_half_a_port_is_seen_and_mended(network: LinuxNetwork) -> None:
    """Killed between two steps: a tap without rules, rules without a tap, a tap that is not yet on the bridge."""
    await network.ensure_port(PORT)
    run(f"ip link del {PORT.tap}")
    assert await network.observe() == ObservedNetwork(frozenset(), BOTH.chains)
    run("nft flush ruleset")
    run(f"ip tuntap add {PORT.tap} mode tap")
    assert await network.observe() == ObservedNetwork(BOTH.taps, frozenset())
    await network.ensure_port(PORT)
    assert await network.observe() == BOTH


@pytest.mark.parametrize("half", ["true", f"ip link del {PORT.tap}", "nft flush ruleset", "ip link del bedplate0"])
async def test_removal_leaves_nothing(network: LinuxNetwork, half: str) -> None:
    """A removed port is gone with its neighbour and rules, also when half of it was gone before; twice is as good as once."""
    before = describe_host()
    await network.ensure_port(PORT)
    run(half)
    await network.remove_port(PORT.sandbox_id)
    await network.remove_port(PORT.sandbox_id)
    assert PORT.sandbox_id not in describe_host()
    await network.ensure_bridge()
    assert _without_hardware(describe_host()) == _without_hardware(before)


async def test_an_orphaned_chain_is_swept(network: LinuxNetwork) -> None:
    """A chain that no tap leads to is not observed, and goes with the next look at the bridge."""
    await network.ensure_port(PORT)
    run(f"nft delete element bridge bedplate taps {{ {PORT.tap} }}")
    run(f"ip link del {PORT.tap}")
    assert await network.observe() == ObservedNetwork()
    await network.ensure_bridge()
    assert PORT.sandbox_id not in run("nft list ruleset")


async def test_the_bridge_goes_with_all(settings: NetworkSettings) -> None:
    """After remove_bridge the host is as before, and doing it again is no error."""
    before = describe_host()
    driver = LinuxNetwork(settings)
    await driver.ensure_bridge()
    await driver.ensure_port(PORT)
    await driver.remove_bridge()
    await driver.remove_bridge()
    assert describe_host() == before


async def test_a_name_that_is_taken_is_refused(settings: NetworkSettings) -> None:
    """A device of the bridge's name that is no bridge is left alone, and named in the error."""
    driver = LinuxNetwork(replace(settings, bridge="lo", address=IPv4Interface("10.78.0.1/24")))
    with pytest.raises(HostFaultError) as caught:
        await driver.ensure_bridge()
    assert caught.value.code == "bridge_failed"
    await driver.remove_bridge()


def _without_hardware(text: str) -> str:
    """The description without hardware addresses and carrier, which are random or follow the port's history, in a fixed order."""
    passing = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}|<.*>|\b(?:UP|DOWN|UNKNOWN|LOWERLAYERDOWN)\b")
    return "\n".join(sorted(" ".join(passing.sub("", line).split()) for line in text.split("\n")))
