"""The egress policy: what each entry allows, what it does not, and what is no entry at all."""

from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from fleet.model.ids import SandboxId
from fleet.model.policy import (
    EGRESS_ALLOW_MAX,
    Fault,
    Policy,
    is_closed_address,
    normalise_name,
    parse_entry,
    parse_policy,
    placeholder,
    policy_faults,
)
from fleet.model.sandbox import CredentialRoute, HttpRule, Network

ROUTE = CredentialRoute("API_KEY", "api-key", ("api.example.com",), headers=("authorization",), prefix="sk-")


def policy(*allow: str, rules: tuple[HttpRule, ...] = (), routes: tuple[CredentialRoute, ...] = ()) -> Policy:
    """What these entries make."""
    return parse_policy(Network(egress_allow=allow, rules=rules), routes)


@pytest.mark.parametrize(
    ("entry", "name", "is_allowed"),
    [
        ("example.com", "example.com", True),
        ("Example.COM.", "example.com", True),
        ("example.com", "evilexample.com", False),
        ("example.com", "a.example.com", False),
        ("example.com", "example.com.evil.net", False),
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "a.b.example.com", False),
        ("*.example.com", "evilexample.com", False),
        ("*.example.com", ".example.com", False),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", True),
    ],
)
def test_a_name_is_allowed_whole(entry: str, name: str, is_allowed: bool) -> None:
    """No suffix, prefix or deeper name of an allowed one gets through."""
    assert policy(entry).may_resolve(name) is is_allowed
    assert (policy(entry).match_name(name, "web", 443) is not None) is is_allowed


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("", "no name"),
        ("*", "no name"),
        ("*.com", "top-level"),
        ("a*.example.com", "no name"),
        ("*.*.example.com", "no name"),
        ("a..example.com", "no name"),
        ("example.com..", "no name"),
        ("-a.example.com", "no name"),
        ("exa mple.com", "no name"),
        ("user@example.com", "no name"),
        ("a" * 64 + ".example.com", "no name"),
        ("127.1", "no name"),
        ("0x7f.1", "no name"),
        ("example.0x7f", "no name"),
        ("010.0.0.1", "no name"),
        ("1.2.3.4.", "no name"),
        ("bücher.example", "not ASCII"),
        ("[::1]", "IPv6"),
        ("2001:db8::/32", "IPv6"),
        ("example.com:0", "no ports"),
        ("example.com:65536", "no ports"),
        ("example.com:90-80", "no ports"),
        ("example.com:", "no ports"),
        ("198.18.7.1/24", "bits set"),
        ("198.18.7.0/0.0.0.255", "no IPv4"),
        ("198.18.7.0/33", "no IPv4"),
        ("http://example.com", "no protocol"),
        ("udp://ntp.example.com:123", "addresses"),
        ("tcp://example.com", "needs its ports"),
    ],
)
def test_what_is_no_entry_says_why(entry: str, words: str) -> None:
    """A typing error is refused with the field, the cause and what to write, and allows nothing meanwhile."""
    fault = parse_entry(entry)
    assert isinstance(fault, Fault)
    assert words in fault.message
    assert fault.next_step
    assert [field for field, _ in policy_faults(Network(egress_allow=(entry,)), ())] == ["network.egress_allow[0]"]
    assert (policy(entry).names, policy(entry).nets) == ((), ())


def test_unicode_is_answered_with_its_ascii_form() -> None:
    """The owner sees which name it would be, and writes that."""
    fault = parse_entry("bücher.example")
    assert isinstance(fault, Fault)
    assert "xn--bcher-kva.example" in fault.next_step


def test_ports_and_protocols_are_part_of_a_rule() -> None:
    """A name without ports is for the web's; `tcp` and `web` are two ways."""
    web = policy("example.com", "other.example.com:8000-8002,9000")
    assert [port for port in (22, 80, 443, 8443) if web.match_name("example.com", "web", port)] == [80, 443]
    assert [port for port in (443, 8001, 8003, 9000) if web.match_name("other.example.com", "web", port)] == [
        8001,
        9000,
    ]
    assert web.match_name("example.com", "tcp", 443) is None
    database = policy("tcp://db.example.com:5432")
    assert database.match_name("db.example.com", "tcp", 5432) is not None
    assert database.match_name("db.example.com", "web", 5432) is None
    assert database.may_resolve("db.example.com")


def test_networks() -> None:
    """Address, protocol and port all have to fit."""
    nets = policy("198.18.7.0/24", "tcp://8.8.8.8:53", "udp://9.9.9.0/24:53,123")
    assert nets.match_net(IPv4Address("198.18.7.9"), "udp", 1) is not None
    assert nets.match_net(IPv4Address("198.18.8.9"), "tcp", 1) is None
    assert nets.match_net(IPv4Address("8.8.8.8"), "tcp", 53) is not None
    assert nets.match_net(IPv4Address("8.8.8.8"), "udp", 53) is None
    assert nets.match_net(IPv4Address("9.9.9.9"), "udp", 123) is not None
    assert nets.match_net(IPv4Address("9.9.9.9"), "tcp", 123) is None


@pytest.mark.parametrize(
    "address",
    [
        *("10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "100.127.255.255", "127.0.0.1"),
        *("169.254.169.254", "0.0.0.0", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "198.18.0.1"),
        *("192.0.2.1", "198.51.100.1", "203.0.113.1", "192.0.0.1"),
    ],
)
def test_closed_addresses(address: str) -> None:
    """Nobody's own network, metadata service or group is a destination."""
    assert is_closed_address(IPv4Address(address))


def test_open_addresses() -> None:
    """The edges of the closed ranges are the internet's."""
    for text in ("9.255.255.255", "11.0.0.0", "100.128.0.0", "172.32.0.1", "192.169.0.1", "8.8.8.8", "223.255.255.255"):
        assert not is_closed_address(IPv4Address(text)), text


def test_requests_are_held_to_methods_and_paths() -> None:
    """One of the host's rules must fit as a whole; a host without rules may be asked anything."""
    rules = (
        HttpRule("api.example.com", ("GET",), ("/v1/models", "/v1/files/*")),
        HttpRule("api.example.com", ("POST",)),
    )
    held = policy("api.example.com", "free.example.com", rules=rules)
    assert held.may_request("api.example.com", "GET", "/v1/models")
    assert held.may_request("api.example.com", "GET", "/v1/files/a/b")
    assert held.may_request("api.example.com", "POST", "/any")
    assert not held.may_request("api.example.com", "GET", "/v1/models/x")
    assert not held.may_request("api.example.com", "DELETE", "/v1/files/a")
    assert held.may_request("free.example.com", "DELETE", "/")
    assert (held.ends_tls("api.example.com", 443), held.ends_tls("free.example.com", 443)) == (True, False)


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/files/../admin", "/v1/files/..", "/v1/files/%2e%2e/admin", "/v1/files/..%2fadmin", "/v1/files//admin"),
        *("/v1/files/..;/admin", "/v1/files/..\\admin", "/v1/files/%252e", "/v1/files/\u00e9", "/v1/files/a#b"),
    ],
)
def test_a_path_that_is_read_in_two_ways_fits_no_rule(path: str) -> None:
    """What the server resolves to another path is not let through by the prefix that it pretends to have."""
    held = policy("api.example.com", rules=(HttpRule("api.example.com", (), ("/v1/files/*",)),))
    assert not held.may_request("api.example.com", "GET", path)


def test_a_route_allows_its_hosts_and_ends_their_tls() -> None:
    """The secret goes to exactly the bound name, port and path."""
    bound = policy(routes=(replace(ROUTE, hosts=("api.example.com:8443",), paths=("/v1/*",)),))
    assert bound.may_resolve("api.example.com")
    assert bound.match_name("api.example.com", "web", 8443) is not None
    assert bound.match_name("api.example.com", "web", 443) is None
    assert (bound.ends_tls("api.example.com", 8443), bound.ends_tls("api.example.com", 443)) == (True, False)
    assert bound.routes_for("api.example.com", 8443, "/v1/messages")
    assert not bound.routes_for("api.example.com", 8443, "/v2/messages")
    assert not bound.routes_for("api.example.com", 8443, "/v1/../v2")
    assert not bound.routes_for("evil.example.com", 8443)


@pytest.mark.parametrize(
    ("route", "field"),
    [
        (replace(ROUTE, hosts=()), "hosts"),
        (replace(ROUTE, hosts=("*.example.com",)), "hosts"),
        (replace(ROUTE, hosts=("8.8.8.8",)), "hosts"),
        (replace(ROUTE, hosts=("api.example.com:1-2",)), "hosts"),
        (replace(ROUTE, headers=()), "headers"),
        (replace(ROUTE, headers=("x y",)), "headers"),
        (replace(ROUTE, query=("a&b",)), "query"),
        (replace(ROUTE, paths=("v1",)), "paths"),
        (replace(ROUTE, paths=("/a/*/b",)), "paths"),
        (replace(ROUTE, prefix="sk\r\n"), "prefix"),
    ],
)
def test_a_route_with_a_fault_names_its_field(route: CredentialRoute, field: str) -> None:
    """A secret is bound to whole names and said places, or refused."""
    assert [found for found, _ in policy_faults(Network(), (route,))] == [f"routes[0].{field}"]


def test_a_rule_for_a_host_that_is_not_allowed_is_refused() -> None:
    """It would never be asked: its author meant something else."""
    network = Network(egress_allow=("*.example.com",), rules=(HttpRule("api.example.com"), HttpRule("example.com")))
    assert [field for field, _ in policy_faults(network, ())] == ["network.rules[1].host"]


def test_too_many_entries_are_one_fault() -> None:
    """And the check itself stays bounded."""
    faults = list(policy_faults(Network(egress_allow=("",) * (EGRESS_ALLOW_MAX + 1000)), ()))
    assert len(faults) == EGRESS_ALLOW_MAX + 1


def test_the_digest_is_of_everything() -> None:
    """Whatever changes in the policy changes its name, and nothing else does."""
    base = Network(egress_allow=("example.com",))
    others = [replace(base, connections_max=1), replace(base, egress_allow=("example.com.",)), Network()]
    digests = {parse_policy(network, ()).digest for network in (base, *others)} | {parse_policy(base, (ROUTE,)).digest}
    assert len(digests) == 5
    assert parse_policy(base, ()).digest == parse_policy(replace(base), ()).digest


def test_placeholders_differ_by_sandbox_and_route() -> None:
    """Deterministic, with the prefix that clients check for."""
    one = placeholder(SandboxId("01j9zt7x0000"), ROUTE)
    assert one == "sk-bedplate_01j9zt7x0000_API_KEY"
    assert (
        len(
            {
                one,
                placeholder(SandboxId("01j9zt7x0001"), ROUTE),
                placeholder(SandboxId("01j9zt7x0000"), replace(ROUTE, name="B")),
            }
        )
        == 3
    )


def test_normalising_is_idempotent() -> None:
    """The compared form is its own."""
    name = normalise_name("API.Example.com.")
    assert name == "api.example.com"
    assert normalise_name(name) == name
