"""The egress policy's parser, given anything: it never fails, and allows nothing that no line names."""

from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from fleet.model.policy import (
    NameRule,
    NetRule,
    is_closed_address,
    normalise_name,
    parse_entry,
    parse_policy,
    policy_faults,
)
from fleet.model.sandbox import CredentialRoute, HttpRule, Network

ALPHABET = "aAz09.-_*:/[]@%xn \u00fc\u0130\u2024\uff0e\0,tcpud"
TEXTS = st.one_of(st.text(ALPHABET, max_size=40), st.text(max_size=40), st.ip_addresses().map(str))
LABELS = st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True)
NAMES = st.lists(LABELS, min_size=2, max_size=4).map(".".join)


@given(st.lists(TEXTS, max_size=6), st.lists(TEXTS, max_size=3), TEXTS)
def test_any_text_is_an_entry_or_a_fault(allow: list[str], paths: list[str], other: str) -> None:
    """Nothing raises, and what has a fault allows nothing."""
    network = Network(egress_allow=tuple(allow), rules=(HttpRule(other, (other,), tuple(paths)),))
    routes = (CredentialRoute("A", "a", (other, *allow), tuple(paths), (other,), (other,), other),)
    faulty = {field for field, _ in policy_faults(network, routes)}
    policy = parse_policy(network, routes)
    good = [index for index in range(len(allow)) if f"network.egress_allow[{index}]" not in faulty]
    from_list = [rule for rule in policy.names if not rule.text.startswith("secrets.")]
    assert len(good) == len(from_list) + len(policy.nets)
    assert policy.may_request(other, other, other) in (True, False)


@given(TEXTS, NAMES)
def test_an_entry_allows_only_the_name_that_it_writes(entry: str, asked: str) -> None:
    """A name that is let through is the entry's own, or one label below its wildcard."""
    rule = parse_entry(entry)
    if isinstance(rule, NameRule) and rule.has_name(asked):
        written = entry.lower().split("://")[-1].split(":")[0].removesuffix(".")
        assert written in (asked, "*." + asked.partition(".")[2])


@given(NAMES, NAMES)
def test_a_names_neighbours_are_not_allowed(name: str, other: str) -> None:
    """Prefixes, suffixes and joined names do not pass for it."""
    policy = parse_policy(Network(egress_allow=(name,)), ())
    if normalise_name(name) is None:
        assert policy.names == ()
        return
    assert policy.may_resolve(name)
    for asked in (f"x{name}", f"x.{name}", f"{name}.{other}", f"{name}x", name.partition(".")[2], f"{other}-{name}"):
        assert not policy.may_resolve(asked)


@given(st.ip_addresses(v=4), st.integers(0, 32), st.ip_addresses(v=4), st.integers(1, 65535))
def test_a_network_allows_its_own_addresses(base: IPv4Address, prefix: int, asked: IPv4Address, port: int) -> None:
    """Exactly those whose first bits are its own."""
    mask = (0xFFFFFFFF << (32 - prefix)) & 0xFFFFFFFF
    net = IPv4Address(int(base) & mask)
    policy = parse_policy(Network(egress_allow=(f"tcp://{net}/{prefix}",)), ())
    assert isinstance(parse_entry(f"{net}/{prefix}"), NetRule)
    assert (policy.match_net(asked, "tcp", port) is not None) == (int(asked) & mask == int(net))
    assert policy.match_net(asked, "udp", port) is None


@given(st.ip_addresses(v=4))
def test_what_is_not_global_is_closed(address: IPv4Address) -> None:
    """As `ipaddress` knows IANA's registry of special purposes."""
    assert address.is_global or is_closed_address(address)
