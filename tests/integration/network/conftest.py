"""The real network driver, in a network namespace that belongs to this test run."""

import os
from collections.abc import AsyncIterator
from ipaddress import IPv4Interface

import pytest

from hostd.drivers.network import LinuxNetwork, NetworkSettings


@pytest.fixture
def settings() -> NetworkSettings:
    """Settings of a host whose taps belong to an unprivileged user; refuses to touch any but private namespaces."""
    assert os.environ.get("BEDPLATE_PRIVATE") == "1", "this test changes the network: run it in private namespaces"
    return NetworkSettings("bedplate0", IPv4Interface("10.77.0.1/16"), tap_uid=64123, tap_gid=64123)


@pytest.fixture
async def network(settings: NetworkSettings) -> AsyncIterator[LinuxNetwork]:
    """The driver with its bridge; both are gone afterwards."""
    driver = LinuxNetwork(settings)
    await driver.ensure_bridge()
    yield driver
    await driver.remove_bridge()
