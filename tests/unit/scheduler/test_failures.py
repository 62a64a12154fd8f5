"""Who fails too often waits, and nobody else does."""

import pytest

from fleet.errors import UnavailableError
from scheduler.api.failures import ADDRESSES_MAX, FAILURES_MAX, WINDOW_S, FailureLimit, address_of


def test_an_address_that_fails_waits_out_its_window() -> None:
    """FAILURES_MAX in a window are let through, the next is told how long to wait, another address is not held up."""
    now = 0.0
    limit = FailureLimit(lambda: now)
    for _ in range(FAILURES_MAX):
        limit.check("10.0.0.7")
        limit.note("10.0.0.7")
    with pytest.raises(UnavailableError, match=r"10\.0\.0\.7") as caught:
        limit.check("10.0.0.7")
    assert (caught.value.code, caught.value.next_step) == (
        "failures_exhausted",
        f"wait {WINDOW_S:.0f} s, then try again",
    )
    limit.check("10.0.0.8")
    now += WINDOW_S
    limit.check("10.0.0.7")
    limit.note("10.0.0.7")
    limit.check("10.0.0.7")


def test_a_flood_of_addresses_is_bounded() -> None:
    """The oldest is forgotten; the newest still counts."""
    limit = FailureLimit(lambda: 0.0)
    for number in range(3 * ADDRESSES_MAX):
        limit.note(str(number))
    assert len(limit._failures) == ADDRESSES_MAX
    for _ in range(FAILURES_MAX):
        limit.note("last")
    with pytest.raises(UnavailableError):
        limit.check("last")


PEERS = {
    "ipv4:10.0.0.7:4711": "10.0.0.7",
    "ipv6:[::1]:4711": "::/64",
    "ipv6:%5B2001:db8::5%5D:4711": "2001:db8::/64",
    "ipv6:[fe80::1%eth0]:1": "fe80::/64",
    "ipv6:[::ffff:10.0.0.7]:4711": "10.0.0.7",
    "unix:": "unknown",
    "": "unknown",
}


@pytest.mark.parametrize(("peer", "address"), PEERS.items())
def test_a_peers_address(peer: str, address: str) -> None:
    """Without its port; of IPv6 the network, for one machine has all of it, but IPv4 on a listener for both stays itself."""
    assert address_of(peer) == address
