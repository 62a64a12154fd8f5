"""Events of a network log as people read them."""

from fleet.model.egress import NetworkEvent
from fleet.model.sandbox import Network, NetworkMode
from mb.moments import render_moment
from mb.render.text import flow

# What a cause of the packet filter means; any other is shown as it is.
CAUSES = {
    "closed": "frames of a sandbox that may send none",
    "ipv6": "IPv6 frames",
    "wrong_mac": "frames with another's MAC address",
    "wrong_ip": "packets with another's IP address",
    "wrong_arp_mac": "ARP with another's MAC address",
    "wrong_arp_ip": "ARP with another's IP address",
    "wrong_ethertype": "frames that are neither IPv4 nor ARP",
}


_MODES = {
    NetworkMode.NONE: "no network device",
    NetworkMode.CLOSED: "nothing leaves the sandbox, and nothing reaches it",
    NetworkMode.ALLOW: "what the policy lists is reached, and nothing else",
    NetworkMode.BRIDGED: "the host's own network",
}


def render_policy(network: Network, digest: str) -> list[str]:
    """The mode with what it means, each line of the policy, and the digest of all of it."""
    allowed = [f"allow   {entry}" for entry in network.egress_allow]
    return [f"mode    {network.mode}: {_MODES[network.mode]}", *allowed, f"digest  {digest}"]


def render_network_event(event: NetworkEvent) -> list[str]:
    """One event: when, whether it was let through, what it was and why; what does not fit follows indented."""
    verdict = "denied " if event.is_denied else "allowed"
    first, *rest = flow(f"{render_moment(event.at_ms)} {verdict} ", _describe(event))
    return [first, *rest]


def _describe(event: NetworkEvent) -> str:
    number = f"{event.count} " if event.count != 1 else ""
    what = f"{number}{CAUSES.get(event.reason, event.kind)}"
    target = f"{event.name or event.address}:{event.port}" if event.port else event.name or event.address
    asked = f"{event.method} {event.path}".strip()
    status = f"status {event.status}" if event.status else ""
    amounts = (
        f"{event.sent_bytes} bytes out, {event.received_bytes} in, {event.duration_ms} ms" if event.duration_ms else ""
    )
    secret = f"with {event.credential}" if event.credential else ""
    rule = f"by {event.rule}" if event.rule else ""
    words = [what, event.protocol, target, asked, status, amounts, secret, rule]
    why = f" ({event.reason})" if event.reason else ""
    return " ".join(word for word in words if word) + why
