"""How often an address may fail before it must wait. Bounded memory, whoever knocks."""

import ipaddress
from collections import OrderedDict
from collections.abc import Callable

from fleet.errors import UnavailableError

# A person who mistypes is not held up; a program that guesses gets nowhere.
FAILURES_MAX = 5
WINDOW_S = 60.0
# Addresses that have failed lately; past that the oldest is forgotten, so a flood costs memory for this many at most.
ADDRESSES_MAX = 4096
# Whoever has one IPv6 address has all of its /64.
IPV6_PREFIX = 64


class FailureLimit:
    """Counts failures by address, in windows of WINDOW_S."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def check(self, address: str) -> None:
        """Raises UnavailableError `failures_exhausted` for an address that has failed FAILURES_MAX times in its window."""
        since_s, count = self._failures.get(address, (self._clock(), 0))
        left_s = since_s + WINDOW_S - self._clock()
        if count >= FAILURES_MAX and left_s > 0:
            message = f"{count} failures from {address}"
            raise UnavailableError("failures_exhausted", message, f"wait {left_s:.0f} s, then try again")

    def note(self, address: str) -> None:
        """One more failure."""
        since_s, count = self._failures.pop(address, (self._clock(), 0))
        if self._clock() - since_s >= WINDOW_S:
            since_s, count = self._clock(), 0
        self._failures[address] = (since_s, count + 1)
        if len(self._failures) > ADDRESSES_MAX:
            self._failures.popitem(last=False)


def address_of(peer: str) -> str:
    """The address in gRPC's name of a peer ("ipv4:10.0.0.7:4711", "ipv6:[::1]:4711"), of IPv6 its network."""
    text = peer.partition(":")[2].rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return "unknown"
    # A listener for both kinds sees an IPv4 peer so: all of them lie in one /64.
    address = getattr(address, "ipv4_mapped", None) or address
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, IPV6_PREFIX), strict=False))
