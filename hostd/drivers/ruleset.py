"""The packet filter as values: what nft lists, what it should list, and the commands between the two. PURE.

Speaks libnftables' JSON (libnftables-json(5)) and knows neither how nft is run nor which links exist.

table bridge bedplate   prerouting: iifname -> map `taps` -> jump sandbox-<id>; any other bp-* is dropped
                        sandbox-<id>: spoofed frames are dropped by cause, the rest as `closed`
                        input, forward, output: nothing from a tap to the host, between taps, or to a tap
table inet bedplate     input, forward, output: nothing over the bridge, should the tables above be missing

Every rule carries its cause as comment, which names it in the listing; every drop is counted.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

from fleet.model.ids import SandboxId, is_sandbox_id
from hostd.reconcile.state import TAP_PREFIX, Port, tap_name

TABLE = "bedplate"
BRIDGE = "bridge"
INET = "inet"
FAMILIES = (BRIDGE, INET)
# Which chain a tap's frames go through; a tap that is not in it has no way at all.
TAPS_MAP = "taps"
CHAIN_PREFIX = "sandbox-"
ANY_TAP = TAP_PREFIX + "*"
# Before every other chain, NAT and bridge netfilter included: what we drop, nobody else sees.
PRIORITY = -400

Expression = dict[str, Any]
Command = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: its cause, and its expressions with counters at zero; `packets` is what was counted, no part of equality."""

    comment: str
    expressions: tuple[Expression, ...]
    packets: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain with its rules; a base chain when it has a hook. `policy` is always accept: rules drop, so drops are counted."""

    family: str
    name: str
    hook: str = ""
    priority: int = 0
    policy: str = ""
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """Our two tables as nft lists them: chains by family and name, and by tap the chain that it jumps to."""

    chains: Mapping[tuple[str, str], Chain] = field(default_factory=dict)
    jumps: Mapping[str, str] = field(default_factory=dict)
    # The type of the map `taps`; empty when it does not exist.
    taps_type: tuple[str, str] | None = None


_TAPS_TYPE = ("ifname", "verdict")


def plan_base(listing: Listing, bridge: str) -> tuple[Command, ...]:
    """The commands that make the base chains whole; none when they are. Of sandboxes' chains only those go that no tap leads to."""
    commands = []
    if listing.taps_type not in (None, _TAPS_TYPE):
        commands += [_add_table(BRIDGE), {"delete": {"table": {"family": BRIDGE, "name": TABLE}}}]
        listing = Listing({key: chain for key, chain in listing.chains.items() if key[0] != BRIDGE})
    if listing.taps_type is None:
        commands += [_add_table(BRIDGE), {"add": {"map": _taps_map()}}]
    for chain in base_chains(bridge):
        commands += _replace_chain(listing.chains.get((chain.family, chain.name)), chain)
    for family, name in listing.chains:
        if family == BRIDGE and _sandbox_of(name) and name not in listing.jumps.values():
            commands += _delete_chain(name)
    return tuple(commands)


def plan_sandbox(listing: Listing, port: Port) -> tuple[Command, ...]:
    """The commands that make a sandbox's chain, and the way to it, whole; the base chains must stand or be planned before."""
    chain = sandbox_chain(port)
    commands = _replace_chain(listing.chains.get((BRIDGE, chain.name)), chain)
    target = listing.jumps.get(port.tap)
    if target not in (None, chain.name):
        commands.append({"delete": {"element": _element(port.tap, None)}})
    if target != chain.name:
        commands.append({"add": {"element": _element(port.tap, chain.name)}})
    return tuple(commands)


def plan_sandbox_removal(listing: Listing, sandbox_id: SandboxId) -> tuple[Command, ...]:
    """The commands that take a sandbox's chain and the way to it away."""
    commands: list[Command] = []
    if tap_name(sandbox_id) in listing.jumps:
        commands.append({"delete": {"element": _element(tap_name(sandbox_id), None)}})
    if (BRIDGE, chain_name(sandbox_id)) in listing.chains:
        commands += _delete_chain(chain_name(sandbox_id))
    return tuple(commands)


def plan_removal() -> tuple[Command, ...]:
    """The commands that take both tables away, whether they exist or not."""
    return tuple(
        command
        for family in FAMILIES
        for command in (_add_table(family), {"delete": {"table": {"family": family, "name": TABLE}}})
    )


def render(commands: Iterable[Command]) -> str:
    """The commands as one transaction for `nft -j -f -`: all of them take effect at once, or none."""
    return json.dumps({"nftables": [{"metainfo": {"json_schema_version": 1}}, *commands]})


def parse_listing(*texts: str) -> Listing:
    """Our tables out of what `nft -j list ruleset` printed; raises ValueError, KeyError or TypeError when it is something else."""
    chains: dict[tuple[str, str], Chain] = {}
    rules: dict[tuple[str, str], list[Rule]] = {}
    jumps: dict[str, str] = {}
    taps_type = None
    for kind, entry in _entries(texts):
        if kind == "chain":
            chains[entry["family"], entry["name"]] = Chain(
                entry["family"], entry["name"], entry.get("hook", ""), entry.get("prio", 0), entry.get("policy", "")
            )
        elif kind == "rule":
            rules.setdefault((entry["family"], entry["chain"]), []).append(_parse_rule(entry))
        elif kind == "map" and (entry["family"], entry["name"]) == (BRIDGE, TAPS_MAP):
            taps_type = (str(entry["type"]), str(entry["map"]))
            pairs = entry.get("elem", ()) if taps_type == _TAPS_TYPE else ()
            jumps = {str(tap): _target(verdict) for tap, verdict in pairs}
    return Listing({key: _with_rules(chain, rules.get(key, [])) for key, chain in chains.items()}, jumps, taps_type)


def list_sandboxes(listing: Listing) -> frozenset[SandboxId]:
    """Sandboxes whose chain has all its rules and is the one that their tap leads to."""
    found = ((sandbox, chain) for (_, name), chain in listing.chains.items() if (sandbox := _sandbox_of(name)))
    return frozenset(
        sandbox
        for sandbox, chain in found
        if listing.jumps.get(tap_name(sandbox)) == chain.name and tuple(rule.comment for rule in chain.rules) == CAUSES
    )


def count_drops(listing: Listing, sandbox_id: SandboxId) -> dict[str, int]:
    """Frames dropped since the sandbox's chain was made, by cause (CAUSES); empty when it has none."""
    chain = listing.chains.get((BRIDGE, chain_name(sandbox_id)))
    return {rule.comment: rule.packets for rule in chain.rules} if chain else {}


def list_drops(listing: Listing) -> dict[SandboxId, dict[str, int]]:
    """What count_drops tells of each sandbox that has a chain."""
    found = (_sandbox_of(name) for family, name in listing.chains if family == BRIDGE)
    return {sandbox_id: count_drops(listing, sandbox_id) for sandbox_id in found if sandbox_id}


def list_neighbours(listing: Listing) -> dict[SandboxId, tuple[IPv4Address, str]]:
    """By sandbox the one address and MAC that its chain lets frames come from, where the chain says both."""
    found = {}
    for family, name in listing.chains:
        sandbox_id = _sandbox_of(name) if family == BRIDGE else None
        if sandbox_id:
            allowed = {rule.comment: _compared_with(rule) for rule in listing.chains[family, name].rules}
            address, mac = allowed.get("wrong_ip"), allowed.get("wrong_mac")
            if address and mac:
                found[sandbox_id] = IPv4Address(address), mac
    return found


def chain_name(sandbox_id: SandboxId) -> str:
    """The name of a sandbox's chain."""
    return CHAIN_PREFIX + sandbox_id


def base_chains(bridge: str) -> tuple[Chain, ...]:
    """The chains that stand before any sandbox does."""
    from_taps = _match(_meta("iifname"), ANY_TAP)
    to_taps = _match(_meta("oifname"), ANY_TAP)
    from_bridge = _match(_meta("iifname"), bridge)
    to_bridge = _match(_meta("oifname"), bridge)
    way = Rule("way", ({"vmap": {"key": _meta("iifname"), "data": "@" + TAPS_MAP}},))
    # The input chains also hold what skips prerouting: frames to some of IEEE 802.1D's group addresses come to the host with the
    # tap as their device, where an IPv4 packet inside would be taken.
    return (
        _base(BRIDGE, "prerouting", way, _drop("no_way", from_taps)),
        _base(BRIDGE, "input", _drop("to_host", from_taps)),
        _base(BRIDGE, "forward", _drop("from_guest", from_taps), _drop("to_guest", to_taps)),
        _base(BRIDGE, "output", _drop("to_guest", to_taps)),
        _base(INET, "input", _drop("from_bridge", from_bridge), _drop("from_tap", from_taps)),
        _base(
            INET,
            "forward",
            *(_drop("from_bridge", from_bridge), _drop("from_tap", from_taps)),
            *(_drop("to_bridge", to_bridge), _drop("to_tap", to_taps)),
        ),
        _base(INET, "output", _drop("to_bridge", to_bridge), _drop("to_tap", to_taps)),
    )


def sandbox_chain(port: Port) -> Chain:
    """The chain of a sandbox in mode `closed`: what pretends is dropped by cause, what is honest is dropped as `closed`."""
    mac, address = port.mac.lower(), str(port.address)
    rules = (
        _drop("wrong_mac", _match(_payload("ether", "saddr"), mac, "!=")),
        _drop("ipv6", _match(_payload("ether", "type"), "ip6")),
        # VLAN tags among them: the kernel shows a tag that it took off as part of the link header again.
        _drop("wrong_ethertype", _match(_payload("ether", "type"), {"set": ["arp", "ip"]}, "!=")),
        _drop("wrong_arp_mac", _match(_payload("arp", "saddr ether"), mac, "!=")),
        _drop("wrong_arp_ip", _match(_payload("arp", "saddr ip"), address, "!=")),
        _drop("wrong_ip", _match(_payload("ip", "saddr"), address, "!=")),
        _drop("closed"),
    )
    assert tuple(rule.comment for rule in rules) == CAUSES
    return Chain(BRIDGE, chain_name(port.sandbox_id), rules=rules)


CAUSES = ("wrong_mac", "ipv6", "wrong_ethertype", "wrong_arp_mac", "wrong_arp_ip", "wrong_ip", "closed")


def _base(family: str, hook: str, *rules: Rule) -> Chain:
    return Chain(family, hook, hook, PRIORITY, "accept", rules)


def _drop(cause: str, *matches: Expression) -> Rule:
    return Rule(cause, (*matches, {"counter": {"packets": 0, "bytes": 0}}, {"drop": None}))


def _match(left: Expression, right: Any, operator: str = "==") -> Expression:
    return {"match": {"op": operator, "left": left, "right": right}}


def _meta(key: str) -> Expression:
    return {"meta": {"key": key}}


def _payload(protocol: str, name: str) -> Expression:
    return {"payload": {"protocol": protocol, "field": name}}


def _replace_chain(listed: Chain | None, wanted: Chain) -> list[Command]:
    if listed == wanted:
        return []
    name: Command = {"family": wanted.family, "table": TABLE, "name": wanted.name}
    commands = [_add_table(wanted.family)]
    if listed is not None and (listed.hook, listed.priority) != (wanted.hook, wanted.priority):
        commands.append({"delete": {"chain": name}})
    hook = {"type": "filter", "hook": wanted.hook, "prio": wanted.priority, "policy": wanted.policy}
    commands += [{"add": {"chain": {**name, **(hook if wanted.hook else {})}}}, {"flush": {"chain": name}}]
    for rule in wanted.rules:
        place = {"family": wanted.family, "table": TABLE, "chain": wanted.name}
        commands.append({"add": {"rule": {**place, "comment": rule.comment, "expr": list(rule.expressions)}}})
    return commands


def _delete_chain(name: str) -> list[Command]:
    chain = {"chain": {"family": BRIDGE, "table": TABLE, "name": name}}
    return [{"flush": chain}, {"delete": chain}]


def _add_table(family: str) -> Command:
    return {"add": {"table": {"family": family, "name": TABLE}}}


def _taps_map() -> Command:
    key_type, value_type = _TAPS_TYPE
    return {"family": BRIDGE, "table": TABLE, "name": TAPS_MAP, "type": key_type, "map": value_type}


def _element(tap: str, target: str | None) -> Command:
    element = tap if target is None else [tap, {"jump": {"target": target}}]
    return {"family": BRIDGE, "table": TABLE, "name": TAPS_MAP, "elem": [element]}


def _sandbox_of(name: str) -> SandboxId | None:
    text = name.removeprefix(CHAIN_PREFIX)
    return SandboxId(text) if text != name and is_sandbox_id(text) else None


def _entries(texts: Iterable[str]) -> Iterable[tuple[str, dict[str, Any]]]:
    for text in texts:
        for wrapped in json.loads(text)["nftables"]:
            for kind, entry in wrapped.items():
                if entry.get("table") == TABLE and entry.get("family") in FAMILIES:
                    yield kind, entry


def _parse_rule(entry: dict[str, Any]) -> Rule:
    expressions, packets = [], 0
    for expression in entry["expr"]:
        if isinstance(expression.get("counter"), dict):
            packets += int(expression["counter"]["packets"])
            expressions.append({"counter": {"packets": 0, "bytes": 0}})
        else:
            expressions.append(_sort_set(expression))
    return Rule(str(entry.get("comment", "")), tuple(expressions), packets)


def _sort_set(expression: Expression) -> Expression:
    """nft lists a set in the kernel's order, not in the one it was told."""
    match = expression.get("match")
    if not match or not isinstance(match["right"], dict) or "set" not in match["right"]:
        return expression
    return {"match": {**match, "right": {"set": sorted(match["right"]["set"], key=str)}}}


def _compared_with(rule: Rule) -> str:
    """What a rule's first match compares with; empty when it has none."""
    match = rule.expressions[0].get("match") if rule.expressions else None
    return match["right"] if match and isinstance(match["right"], str) else ""


def _target(verdict: Any) -> str:
    """The chain that a map's element jumps to; any other verdict as itself, which is no chain's name."""
    if isinstance(verdict, dict) and isinstance(verdict.get("jump"), dict):
        return str(verdict["jump"]["target"])
    return json.dumps(verdict)


def _with_rules(chain: Chain, rules: list[Rule]) -> Chain:
    return Chain(chain.family, chain.name, chain.hook, chain.priority, chain.policy, tuple(rules))
