"""What a sandbox may reach, read from its spec: which names, networks and requests. PURE.

egress_allow entry   [tcp://|udp://]target[:port[-port][,port[-port]...]]
    api.example.com          its web ports, 80 and 443, by SNI or Host
    *.example.com            likewise every name with one label more, and not example.com itself
    tcp://db.example.com:5432   any protocol, to the addresses that the gateway's DNS gave this sandbox for the name
    203.0.113.0/24           IPv4, every TCP and UDP port; tcp://203.0.113.7:443 one of them

What does not parse allows nothing. The kernel's rules, the gateway, admission and `mb network test` all ask this module.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError

from fleet.model.ids import SandboxId
from fleet.model.sandbox import CredentialRoute, HttpRule, Network

# The web's own ports; a name without ports means these.
WEB_PORTS = (80, 443)
TLS_PORT = 443
PORT_MAX = 65535
# A list that nobody reads is no policy, and each entry costs the kernel a rule or the gateway a comparison.
EGRESS_ALLOW_MAX, HTTP_RULES_MAX, PORTS_MAX = 256, 64, 16
# What one rule or route names; hosts, methods, paths, headers and query parameters alike.
NAMED_MAX = 32
# RFC 1035: a name in its text form, and one label.
NAME_CHARS_MAX = 253
PATH_CHARS_MAX = 1024

# Never reached by a guest unless the host's own policy opens it: IANA's special-purpose registry for IPv4 with multicast, the
# former class E and broadcast. 169.254.0.0/16 holds every cloud's metadata service, 100.64.0.0/10 is carriers' NAT.
CLOSED_NETS = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# What resolvers and URL parsers take for an IPv4 address in its odd forms (0x7f.1, 127.1, 010.0.0.1) ends with such a label.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORTS = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*")
_METHOD = re.compile(r"[A-Z]{1,32}")
_PATH = re.compile(r"/[!-)+->@-~]*\*?")
_HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")
_PARAMETER = re.compile(r"[A-Za-z0-9_.~-]{1,64}")
_PREFIX = re.compile(r"[A-Za-z0-9_-]{0,32}")
# What two servers read differently in a path: dot segments, doubled or other slashes, parameters, and any of these in percent form.
_AMBIGUOUS = re.compile(r"//|/\.{1,2}([/;]|$)|\\|%(2e|2f|3b|5c|25|00)|[^!-~]|[?#]", re.IGNORECASE)
# A netmask can be read as its own opposite (0.0.0.255); a prefix length cannot.
_NET = re.compile(r"[0-9.]+(/[0-9]{1,2})?")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a line of a policy is none, and what to write instead."""

    message: str
    next_step: str


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports from `first` to `last`, both included."""

    first: int
    last: int

    def has(self, port: int) -> bool:
        """Whether `port` is one of them."""
        return self.first <= port <= self.last


@dataclass(frozen=True, slots=True)
class NameRule:
    """One allowed name; `protocol` is `web` (TLS by SNI and HTTP by Host) or `tcp` (anything, to its pinned addresses)."""

    text: str
    name: str
    is_wildcard: bool
    protocol: str
    ports: tuple[PortRange, ...]

    def has_name(self, name: str) -> bool:
        """Whether it means this normalised name."""
        if not self.is_wildcard:
            return name == self.name
        label, _, rest = name.partition(".")
        return bool(label) and rest == self.name


@dataclass(frozen=True, slots=True)
class NetRule:
    """One allowed network with its ports; `protocol` is `tcp`, `udp`, or empty for both."""

    text: str
    net: IPv4Network
    protocol: str
    ports: tuple[PortRange, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything that a sandbox may reach; `digest` names it, 64 hex digits over all of `[network]` and its routes."""

    names: tuple[NameRule, ...]
    nets: tuple[NetRule, ...]
    rules: tuple[HttpRule, ...]
    routes: tuple[CredentialRoute, ...]
    digest: str

    def may_resolve(self, name: str) -> bool:
        """Whether a question for this normalised name may leave the host."""
        return any(rule.has_name(name) for rule in self.names)

    def match_name(self, name: str, protocol: str, port: int) -> NameRule | None:
        """The rule that lets the sandbox speak `protocol` (`web`, `tcp`) to a normalised name at a port."""
        return next(
            (
                rule
                for rule in self.names
                if rule.protocol == protocol and rule.has_name(name) and _has_port(rule.ports, port)
            ),
            None,
        )

    def match_net(self, address: IPv4Address, protocol: str, port: int) -> NetRule | None:
        """The rule that lets the sandbox send `protocol` (`tcp`, `udp`) to an address's port."""
        return next(
            (
                rule
                for rule in self.nets
                if rule.protocol in ("", protocol) and address in rule.net and _has_port(rule.ports, port)
            ),
            None,
        )

    def ends_tls(self, name: str, port: int) -> bool:
        """Whether TLS to this name and port ends at the gateway: a secret is put in there, or requests are looked at."""
        return bool(self.http_rules(name) or self.routes_for(name, port))

    def http_rules(self, name: str) -> tuple[HttpRule, ...]:
        """The rules for requests to a normalised name; none: any request may be made."""
        return tuple(rule for rule in self.rules if normalise_name(rule.host) == name)

    def may_request(self, name: str, method: str, path: str) -> bool:
        """Whether a request may be made of an allowed name; `path` is without its query, and not one read in two ways."""
        rules = self.http_rules(name)
        return not rules or any(
            (not rule.methods or method in rule.methods) and _has_path(rule.paths, path) for rule in rules
        )

    def routes_for(self, name: str, port: int, path: str | None = None) -> tuple[CredentialRoute, ...]:
        """The routes bound to a normalised name and port, and to `path` unless that is None."""
        return tuple(
            route
            for route in self.routes
            if (name, port) in bound_hosts(route) and (path is None or _has_path(route.paths, path))
        )


def parse_policy(network: Network, routes: tuple[CredentialRoute, ...]) -> Policy:
    """The policy of a spec; a route allows the hosts that it is bound to. Lines with a fault allow nothing."""
    entries = [parse_entry(text) for text in network.egress_allow[:EGRESS_ALLOW_MAX]]
    bound = [
        NameRule(f"secrets.{route.name}", name, False, "web", (PortRange(port, port),))
        for route in routes
        for name, port in bound_hosts(route)
    ]
    written = json.dumps([asdict(network), [asdict(route) for route in routes]], sort_keys=True, ensure_ascii=True)
    return Policy(
        names=(*(entry for entry in entries if isinstance(entry, NameRule)), *bound),
        nets=tuple(entry for entry in entries if isinstance(entry, NetRule)),
        rules=network.rules,
        routes=routes,
        digest=hashlib.sha256(written.encode()).hexdigest(),
    )


def parse_entry(text: str) -> NameRule | NetRule | Fault:
    """One entry of `egress_allow`, or what is wrong with it."""
    scheme, separator, rest = text.partition("://")
    protocol, target_text = (scheme.lower(), rest) if separator else ("", text)
    if protocol not in ("", "tcp", "udp"):
        return Fault(f"{scheme[:16]!r} is no protocol", "write tcp://, udp:// or nothing before the name or network")
    if target_text.count(":") > 1:
        return Fault("IPv6 is dropped whole in a sandbox", "name the host, or its IPv4 network")
    target, colon, port_text = target_text.partition(":")
    ports = _parse_ports(port_text) if colon else ()
    if ports is None:
        return Fault(f"{port_text[:40]!r} are no ports", f"write for example 443 or 8000-8010,9000, up to {PORT_MAX}")
    if "/" in target or is_address(target):
        return _parse_net(text, target, protocol, ports or (PortRange(1, PORT_MAX),))
    return _parse_name(text, target, protocol, ports)


def policy_faults(network: Network, routes: tuple[CredentialRoute, ...]) -> Iterator[tuple[str, Fault]]:
    """Every fault with the field that it is in, as `network.egress_allow[0]` or `routes[0].hosts`."""
    if len(network.egress_allow) > EGRESS_ALLOW_MAX:
        many = f"{len(network.egress_allow)} entries are more than {EGRESS_ALLOW_MAX}"
        yield "network.egress_allow", Fault(many, "name fewer, for example by a wildcard or a network")
    for index, text in enumerate(network.egress_allow[:EGRESS_ALLOW_MAX]):
        entry = parse_entry(text)
        if isinstance(entry, Fault):
            yield f"network.egress_allow[{index}]", entry
    if len(network.rules) > HTTP_RULES_MAX:
        yield "network.rules", Fault(f"{len(network.rules)} rules are more than {HTTP_RULES_MAX}", "write fewer")
    policy = parse_policy(network, routes)
    for index, rule in enumerate(network.rules[:HTTP_RULES_MAX]):
        yield from _rule_faults(f"network.rules[{index}]", rule, policy)
    for index, route in enumerate(routes[:NAMED_MAX]):
        yield from _route_faults(f"routes[{index}]", route)


def normalise_name(text: str) -> str | None:
    """A host's name in the one form that is compared: ASCII, lower case, no dot at the end; None for anything else.

    Labels as RFC 1035 with `_` (RFC 2782 uses it); a name that could be read as an address is none. Unicode is refused, as IDNA
    2003 and 2008 turn some of it into different names: the ASCII form (`xn--...`) says which one is meant.
    """
    name = text.lower().removesuffix(".") if text.isascii() else ""
    labels = name.split(".")
    if len(name) > NAME_CHARS_MAX or not all(_LABEL.fullmatch(label) for label in labels):
        return None
    return None if _NUMBER.fullmatch(labels[-1]) else name


def is_address(text: str) -> bool:
    """Whether `text` is an IPv4 address in its one usual form."""
    try:
        IPv4Address(text)
    except AddressValueError:
        return False
    return True


def is_closed_address(address: IPv4Address) -> bool:
    """Whether an address lies in CLOSED_NETS."""
    return any(address in net for net in CLOSED_NETS)


def bound_hosts(route: CredentialRoute) -> tuple[tuple[str, int], ...]:
    """The names with their ports that a route's secret may go to, over TLS; what does not parse is none."""
    found = (_parse_bound(text) for text in route.hosts[:NAMED_MAX])
    return tuple(bound for bound in found if bound is not None)


def placeholder(sandbox_id: SandboxId, route: CredentialRoute) -> str:
    """What the guest holds instead of the secret: ASCII letters, digits, `_` and `-`, of no use to anybody else."""
    return f"{route.prefix}bedplate_{sandbox_id}_{route.name}"


def _parse_ports(text: str) -> tuple[PortRange, ...] | None:
    """None when it is no list of ports."""
    if not _PORTS.fullmatch(text) or text.count(",") >= PORTS_MAX:
        return None
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        ranges.append(PortRange(int(first), int(last or first)))
    return tuple(ranges) if all(1 <= ports.first <= ports.last <= PORT_MAX for ports in ranges) else None


def _parse_net(text: str, target: str, protocol: str, ports: tuple[PortRange, ...]) -> NetRule | Fault:
    if not _NET.fullmatch(target):
        return Fault(f"{target[:80]!r} is no IPv4 network", "write for example 203.0.113.0/24")
    try:
        return NetRule(text, IPv4Network(target), protocol, ports)
    except (AddressValueError, NetmaskValueError):
        return Fault(f"{target[:80]!r} is no IPv4 network", "write for example 203.0.113.0/24")
    except ValueError:
        return Fault(f"{target[:80]!r} has bits set past its prefix", "write the network's own address")


def _parse_name(text: str, target: str, protocol: str, ports: tuple[PortRange, ...]) -> NameRule | Fault:
    if not target.isascii():
        return Fault(f"{target[:80]!r} is not ASCII", f"write its ASCII form{_ascii_form(target)}")
    is_wildcard = target.startswith("*.")
    name = normalise_name(target.removeprefix("*.") if is_wildcard else target)
    if name is None:
        return Fault(f"{target[:80]!r} is no name of a host", "write api.example.com, *.example.com or an IPv4 network")
    if is_wildcard and "." not in name:
        return Fault(f"{target[:80]!r} is a whole top-level domain", "name the domain below it")
    if protocol in ("tcp", "udp"):
        return _parse_other(NameRule(text, name, is_wildcard, protocol, ports))
    return NameRule(text, name, is_wildcard, "web", ports or tuple(PortRange(port, port) for port in WEB_PORTS))


def _parse_other(rule: NameRule) -> NameRule | Fault:
    """A name for something else than the web."""
    if rule.protocol == "udp":
        return Fault(
            "UDP is held to addresses, not to names", "write the network, for example udp://203.0.113.0/24:123"
        )
    if not rule.ports:
        return Fault("tcp:// with a name needs its ports", f"write for example {rule.text[:80]}:5432")
    return rule


def _ascii_form(target: str) -> str:
    """A hint; what IDNA 2003 makes of it, where it makes anything."""
    try:
        return f", {target.encode('idna').decode('ascii')} if that is the one you mean"
    except UnicodeError:
        return ""


def _parse_bound(text: str) -> tuple[str, int] | None:
    host, colon, port_text = text.partition(":")
    ports = _parse_ports(port_text) if colon else (PortRange(TLS_PORT, TLS_PORT),)
    name = normalise_name(host)
    if name is None or ports is None or len(ports) != 1 or ports[0].first != ports[0].last:
        return None
    return name, ports[0].first


def _rule_faults(field: str, rule: HttpRule, policy: Policy) -> Iterator[tuple[str, Fault]]:
    name = normalise_name(rule.host)
    if name is None or not any(entry.protocol == "web" and entry.has_name(name) for entry in policy.names):
        message = f"{rule.host[:80]!r} is no host that egress_allow lets the sandbox reach"
        yield f"{field}.host", Fault(message, "write one of its names, without a port")
    if not all(_METHOD.fullmatch(method) for method in rule.methods) or len(rule.methods) > NAMED_MAX:
        yield f"{field}.methods", Fault("one of them is no method", "write for example GET or POST")
    yield from _path_faults(f"{field}.paths", rule.paths)


def _route_faults(field: str, route: CredentialRoute) -> Iterator[tuple[str, Fault]]:
    wrong = next((text for text in route.hosts if _parse_bound(text) is None), None)
    if wrong is not None or not 1 <= len(route.hosts) <= NAMED_MAX:
        message = f"{wrong[:80]!r} is no name of a host" if wrong else f"it is bound to {len(route.hosts)} hosts"
        yield f"{field}.hosts", Fault(message, f"write 1 to {NAMED_MAX} names, for example api.example.com")
    yield from _path_faults(f"{field}.paths", route.paths)
    if not route.headers and not route.query:
        yield f"{field}.headers", Fault("it says nowhere to put the secret", 'write headers = ["authorization"]')
    if not all(map(_HEADER.fullmatch, route.headers)) or len(route.headers) > NAMED_MAX:
        yield f"{field}.headers", Fault("one of them is no header's name", "write for example authorization")
    if not all(map(_PARAMETER.fullmatch, route.query)) or len(route.query) > NAMED_MAX:
        yield f"{field}.query", Fault("one of them is no parameter's name", "write for example key")
    if not _PREFIX.fullmatch(route.prefix):
        yield f"{field}.prefix", Fault("it cannot begin a placeholder", "use up to 32 letters, digits, _ and -")


def _path_faults(field: str, paths: tuple[str, ...]) -> Iterator[tuple[str, Fault]]:
    wrong = next((path for path in paths if not _is_path_rule(path)), None)
    if wrong is not None or len(paths) > NAMED_MAX:
        message = f"{wrong[:80]!r} is no path" if wrong is not None else f"{len(paths)} are more than {NAMED_MAX}"
        yield field, Fault(message, "write for example /v1/messages, or /v1/* for all below it")


def _is_path_rule(path: str) -> bool:
    is_clean = len(path) <= PATH_CHARS_MAX and not _AMBIGUOUS.search(path.removesuffix("*"))
    return is_clean and _PATH.fullmatch(path) is not None


def _has_port(ports: tuple[PortRange, ...], port: int) -> bool:
    return any(one.has(port) for one in ports)


def _has_path(paths: tuple[str, ...], path: str) -> bool:
    if not paths:
        return True
    if _AMBIGUOUS.search(path):
        return False
    return any(path.startswith(rule[:-1]) if rule.endswith("*") else path == rule for rule in paths)
