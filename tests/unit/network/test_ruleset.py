"""The packet filter's decisions, without a kernel: what is planned for which listing, and in what form."""

import json
from ipaddress import IPv4Address
from typing import Any

import pytest

from fleet.model.ids import SandboxId
from hostd.drivers.ruleset import (
    CAUSES,
    Chain,
    Command,
    Listing,
    base_chains,
    count_drops,
    list_neighbours,
    list_sandboxes,
    parse_listing,
    plan_base,
    plan_removal,
    plan_sandbox,
    plan_sandbox_removal,
    render,
    sandbox_chain,
)
from hostd.reconcile.state import Port

BRIDGE = "bedplate0"
PORT = Port(SandboxId("aaaaaaaaaaaa"), "52:bd:0a:4d:00:02", IPv4Address("10.77.0.2"), 16)
EMPTY = '{"nftables": [{"metainfo": {"json_schema_version": 1}}]}'


def list_chain(chain: Chain, packets: int = 0) -> list[dict[str, Any]]:
    """A chain in the form in which `nft -j list ruleset` prints it."""
    place = {"family": chain.family, "table": "bedplate", "handle": 7}
    hook = {"type": "filter", "hook": chain.hook, "prio": chain.priority, "policy": "accept"} if chain.hook else {}
    listed: list[dict[str, Any]] = [{"chain": {**place, "name": chain.name, **hook}}]
    for rule in chain.rules:
        expressions = [
            {"counter": {"packets": packets, "bytes": 60 * packets}} if "counter" in expression else expression
            for expression in rule.expressions
        ]
        listed.append({"rule": {**place, "chain": chain.name, "comment": rule.comment, "expr": expressions}})
    return listed


def list_all(packets: int = 0) -> str:
    """A host with the base chains and one sandbox, as nft prints it, with another table beside ours."""
    taps = {"family": "bridge", "name": "taps", "table": "bedplate", "type": "ifname", "handle": 1, "map": "verdict"}
    jump = [[PORT.tap, {"jump": {"target": "sandbox-aaaaaaaaaaaa"}}]]
    entries = [{"metainfo": {"version": "1.0.6"}}, {"map": {**taps, "elem": jump}}]
    entries.append({"chain": {"family": "inet", "table": "docker", "name": "input", "handle": 1}})
    for chain in (*base_chains(BRIDGE), sandbox_chain(PORT)):
        entries += list_chain(chain, packets)
    return json.dumps({"nftables": entries})


def verbs(commands: tuple[Command, ...]) -> list[str]:
    return [f"{verb} {kind}" for command in commands for verb, what in command.items() for kind in what]


def test_a_whole_host_needs_nothing() -> None:
    """Counters, handles and other people's tables are no difference."""
    listing = parse_listing(list_all(packets=5))
    assert (plan_base(listing, BRIDGE), plan_sandbox(listing, PORT)) == ((), ())
    assert list_sandboxes(listing) == {PORT.sandbox_id}
    assert count_drops(listing, PORT.sandbox_id) == dict.fromkeys(CAUSES, 5)
    assert list_neighbours(listing) == {PORT.sandbox_id: (PORT.address, PORT.mac)}


def test_an_empty_host_gets_all_in_order() -> None:
    """Tables come before chains, the chain with its rules before the way to it."""
    listing = parse_listing(EMPTY, EMPTY)
    assert verbs(plan_base(listing, BRIDGE))[:3] == ["add table", "add map", "add table"]
    rules = ["add rule"] * len(CAUSES)
    assert verbs(plan_sandbox(listing, PORT)) == ["add table", "add chain", "flush chain", *rules, "add element"]


@pytest.mark.parametrize("cause", CAUSES)
def test_a_missing_rule_is_missed(cause: str) -> None:
    """Any rule that a sandbox's chain lacks makes it unfinished and rewritten; the base chains are left alone."""
    entries = json.loads(list_all())
    entries["nftables"] = [entry for entry in entries["nftables"] if entry.get("rule", {}).get("comment") != cause]
    listing = parse_listing(json.dumps(entries))
    assert list_sandboxes(listing) == frozenset()
    assert plan_base(listing, BRIDGE) == ()
    assert verbs(plan_sandbox(listing, PORT)).count("add rule") == len(CAUSES)


def test_mending_the_base_spares_the_sandboxes() -> None:
    """With a base chain gone only that chain is written: what was counted for sandboxes stays."""
    whole = parse_listing(list_all())
    chains = {key: chain for key, chain in whole.chains.items() if key != ("bridge", "prerouting")}
    commands = plan_base(Listing(chains, whole.jumps, whole.taps_type), BRIDGE)
    assert "sandbox" not in render(commands)
    assert verbs(commands) == ["add table", "add chain", "flush chain", "add rule", "add rule"]


def test_a_tap_that_was_let_through_is_led_back() -> None:
    """An element with another verdict is replaced in the same transaction, and counts as no rules until then."""
    listing = parse_listing(list_all().replace('{"jump": {"target": "sandbox-aaaaaaaaaaaa"}}', '{"accept": null}'))
    assert list_sandboxes(listing) == frozenset()
    assert verbs(plan_sandbox(listing, PORT)) == ["delete element", "add element"]


def test_a_map_of_another_type_takes_the_table_with_it() -> None:
    """A map that cannot hold our elements is replaced with all that hangs on it, at once."""
    listing = parse_listing(list_all().replace('"type": "ifname"', '"type": "ipv4_addr"'))
    assert verbs(plan_base(listing, BRIDGE))[:4] == ["add table", "delete table", "add table", "add map"]


def test_removal_takes_the_way_first() -> None:
    """A chain cannot go while an element jumps to it; what is not there is not removed."""
    listing = parse_listing(list_all())
    assert verbs(plan_sandbox_removal(listing, PORT.sandbox_id)) == ["delete element", "flush chain", "delete chain"]
    assert plan_sandbox_removal(Listing(), PORT.sandbox_id) == ()
    assert verbs(plan_removal()) == ["add table", "delete table"] * 2


def test_every_rule_but_the_way_drops_and_counts() -> None:
    """No chain of ours accepts anything: each rule counts and drops, and a sandbox's last one drops whatever is left."""
    for chain in (*base_chains(BRIDGE), sandbox_chain(PORT)):
        for rule in chain.rules:
            kinds = [kind for expression in rule.expressions for kind in expression]
            assert kinds[-2:] == ["counter", "drop"] or rule.comment == "way"
    assert len(sandbox_chain(PORT).rules[-1].expressions) == 2


def test_a_transaction_is_one_document() -> None:
    """nft takes the commands as one JSON document that names its schema."""
    document = json.loads(render(plan_removal()))
    assert document["nftables"][0] == {"metainfo": {"json_schema_version": 1}}
    assert len(document["nftables"]) == 5


@pytest.mark.parametrize("text", ["", "[]", '{"nftables": [{"rule": {"table": "bedplate", "family": "bridge"}}]}'])
def test_strange_listings_are_refused(text: str) -> None:
    """What is no listing is an error and not an empty one: nobody mends what they cannot read."""
    with pytest.raises((ValueError, KeyError, TypeError)):
        parse_listing(text)
