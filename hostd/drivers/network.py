"""The bridge and the taps through netlink, the packet filter through nft. Decides no rule: `ruleset` does.

rules -> tap (down) -> IPv6 off -> on the bridge, isolated, nothing learnt or flooded -> static neighbours -> up
A frame passes only where a rule, the port's flags and the static neighbours all allow it. Nothing is remembered here: every
call reads what is on the host first.
"""

import asyncio
import errno
import socket
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from fleet.errors import HostFaultError
from fleet.model.ids import SandboxId, is_sandbox_id
from hostd.drivers import ruleset
from hostd.reconcile.state import TAP_PREFIX, ObservedNetwork, Port, mac_address, tap_name

# A transaction takes milliseconds, a dump of a thousand links under one second: ten seconds is a kernel that hangs.
STEP_TIMEOUT_S = 10.0
MTU = 1500
# What of nft's last words goes into an error.
TAIL_CHARS = 500
# Neighbour states of rtnetlink(7): "static" of the bridge's own table, "permanent" of the ARP table.
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
IFF_UP = 0x1
IPV6_CONF = Path("/proc/sys/net/ipv6/conf")
# No spanning tree: it delays the first frame by 30 s and lets guests speak to it. No snooping: the bridge would send queries.
BRIDGE_OPTIONS = {"br_stp_state": 0, "br_mcast_snooping": 0}
# Isolated ports never talk to each other. Nothing is learnt, so no guest can take another's place; a locked port takes frames
# from its static neighbour only. Nothing is flooded: a frame goes to the one port that its address belongs to.
PORT_OPTIONS = {
    "isolated": 1,
    "learning": 0,
    "locked": 1,
    "unicast_flood": 0,
    "mcast_flood": 0,
    "bcast_flood": 0,
    # Group addresses that a bridge keeps to itself (01:80:c2:00:00:0x, IEEE 802.1D) go around prerouting, and LLDP's around every
    # hook, straight to the host's protocols. Taken as ordinary frames (all but :00 to :02, which may not be) they are filtered.
    "group_fwd_mask": 0xFFF8,
}


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """The bridge's name (at most 15 characters) and address, and whom taps belong to: the user and group of QEMU."""

    bridge: str
    address: IPv4Interface
    tap_uid: int
    tap_gid: int


@dataclass(frozen=True, slots=True)
class _Link:
    """One network device: what we read of it."""

    index: int
    name: str
    kind: str
    master: int
    is_up: bool
    mac: str
    options: Mapping[str, Any]


class LinuxNetwork:
    """The bridge of this host and its taps; one call at a time changes something."""

    def __init__(self, settings: NetworkSettings) -> None:
        self._settings = settings
        self._lock = asyncio.Lock()

    async def ensure_bridge(self) -> None:
        """The base rules, then the bridge; raises HostFaultError `rules_failed` or `bridge_failed`."""
        async with self._lock:
            listing = await _list_rules()
            await _apply(ruleset.plan_base(listing, self._settings.bridge))
            async with _netlink("bridge_failed", self._settings.bridge) as netlink:
                bridge = await self._ensure_bridge(netlink)
                await _set_neighbours(netlink, bridge, ruleset.list_neighbours(listing).values())

    async def observe(self) -> ObservedNetwork:
        """What is whole. A tap that is not whole is told only without rules: either way the port looks unfinished, not gone."""
        chains = ruleset.list_sandboxes(await _list_rules())
        async with _netlink("tap_failed", "the taps") as netlink:
            links = await _list_links(netlink)
        bridge = links.get(self._settings.bridge)
        taps = frozenset(
            sandbox_id
            for sandbox_id, tap in _taps(links).items()
            if sandbox_id not in chains or (bridge is not None and _is_whole(tap, bridge))
        )
        return ObservedNetwork(taps, chains)

    async def ensure_port(self, port: Port) -> None:
        """Rules, then the tap; raises HostFaultError `rules_failed`, `bridge_failed` or `tap_failed`."""
        async with self._lock:
            listing = await _list_rules()
            base = ruleset.plan_base(listing, self._settings.bridge)
            await _apply((*base, *ruleset.plan_sandbox(listing, port)))
            async with _netlink("bridge_failed", self._settings.bridge) as netlink:
                bridge = await self._ensure_bridge(netlink)
            async with _netlink("tap_failed", port.tap) as netlink:
                await self._ensure_tap(netlink, bridge, port)

    async def remove_port(self, sandbox_id: SandboxId) -> Mapping[str, int]:
        """The tap, its neighbour, then the rules; raises HostFaultError `tap_failed` or `rules_failed`."""
        async with self._lock:
            async with _netlink("tap_failed", tap_name(sandbox_id)) as netlink:
                tap = await _find_link(netlink, tap_name(sandbox_id))
                bridge = await _find_link(netlink, self._settings.bridge)
                if tap is not None:
                    await netlink.link("del", index=tap.index)
                # Only now: no frame comes any more, and what was counted is all.
                listing = await _list_rules()
                neighbours = ruleset.list_neighbours(listing)
                neighbours.pop(sandbox_id, None)
                if bridge is not None:
                    await _set_neighbours(netlink, bridge, neighbours.values())
            await _apply(ruleset.plan_sandbox_removal(listing, sandbox_id))
            return ruleset.count_drops(listing, sandbox_id)

    async def remove_bridge(self) -> None:
        """Every tap, the bridge, then all rules; raises HostFaultError `bridge_failed` or `rules_failed`."""
        async with self._lock:
            async with _netlink("bridge_failed", self._settings.bridge) as netlink:
                links = await _list_links(netlink)
                bridge = links.get(self._settings.bridge)
                # A device of that name that is no bridge is not ours.
                ours = [bridge] if bridge is not None and bridge.kind == "bridge" else []
                for link in (*_taps(links).values(), *ours):
                    await netlink.link("del", index=link.index)
            await _apply(ruleset.plan_removal())

    async def list_drops(self) -> Mapping[SandboxId, Mapping[str, int]]:
        """What every sandbox's rules have dropped, from one listing; raises HostFaultError `rules_failed`."""
        return ruleset.list_drops(await _list_rules())

    async def _ensure_bridge(self, netlink: Any) -> _Link:
        name, address = self._settings.bridge, self._settings.address
        # An address of its own: the kernel would take the lowest of its ports' and change it with them.
        mac = mac_address(address.ip)
        bridge = await _find_link(netlink, name)
        if bridge is None:
            await netlink.link("add", ifname=name, kind="bridge", address=mac, **BRIDGE_OPTIONS)
            bridge = await _get_link(netlink, name)
        if bridge.kind != "bridge":
            message = f"{name} is a {bridge.kind or 'plain'} device and no bridge"
            raise HostFaultError("bridge_failed", message, "remove it, or configure another name")
        _disable_ipv6(name)
        if not _has_options(bridge, BRIDGE_OPTIONS):
            await netlink.link("set", index=bridge.index, kind="bridge", **BRIDGE_OPTIONS)
        if bridge.mac != mac or not bridge.is_up:
            await netlink.link("set", index=bridge.index, address=mac, state="up")
        prefix = address.network.prefixlen
        await netlink.addr("replace", index=bridge.index, address=str(address.ip), prefixlen=prefix)
        return bridge

    async def _ensure_tap(self, netlink: Any, bridge: _Link, port: Port) -> None:
        tap = await _find_link(netlink, port.tap)
        if tap is None:
            owner = {"uid": self._settings.tap_uid, "gid": self._settings.tap_gid}
            await netlink.link("add", ifname=port.tap, kind="tuntap", mode="tap", **owner)
            tap = await _get_link(netlink, port.tap)
        _disable_ipv6(port.tap)
        if tap.master != bridge.index:
            await netlink.link("set", index=tap.index, master=bridge.index, mtu=MTU)
        await netlink.brport("set", index=tap.index, **PORT_OPTIONS)
        await netlink.fdb("replace", ifindex=tap.index, lladdr=port.mac, state=NUD_NOARP)
        await _ensure_neighbour(netlink, bridge, port.address, port.mac)
        await netlink.link("set", index=tap.index, state="up")


@asynccontextmanager
async def _netlink(code: str, subject: str) -> AsyncIterator[Any]:
    """A netlink socket for one step; what fails within is the HostFaultError `code` that names `subject`."""
    try:
        async with asyncio.timeout(STEP_TIMEOUT_S), AsyncIPRoute() as netlink:
            yield netlink
    except TimeoutError as error:
        raise HostFaultError(code, f"{subject}: the kernel did not answer in {STEP_TIMEOUT_S:.0f} s") from error
    except (NetlinkError, OSError) as error:
        next_step = "hostd needs CAP_NET_ADMIN and /dev/net/tun"
        raise HostFaultError(code, f"{subject}: {error}", next_step) from error


async def _list_links(netlink: Any) -> dict[str, _Link]:
    links = [_parse_link(message) async for message in await netlink.link("dump")]
    return {link.name: link for link in links}


async def _get_link(netlink: Any, name: str) -> _Link:
    """One device; far cheaper than a dump on a host with many taps."""
    (message,) = await netlink.link("get", ifname=name)
    return _parse_link(message)


async def _find_link(netlink: Any, name: str) -> _Link | None:
    try:
        return await _get_link(netlink, name)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise


def _parse_link(message: Any) -> _Link:
    # Of a bridge its own options, of a port those of its place on the bridge.
    options = message.get(("linkinfo", "slave_data")) or message.get(("linkinfo", "data")) or {}
    return _Link(
        index=message["index"],
        name=message.get("ifname"),
        kind=message.get(("linkinfo", "kind")) or "",
        master=message.get("master") or 0,
        is_up=bool(message["flags"] & IFF_UP),
        mac=message.get("address") or "",
        options=dict(options.get("attrs", ())),
    )


def _taps(links: Mapping[str, _Link]) -> dict[SandboxId, _Link]:
    ids = {name: name.removeprefix(TAP_PREFIX) for name in links if name.startswith(TAP_PREFIX)}
    return {SandboxId(text): links[name] for name, text in ids.items() if is_sandbox_id(text)}


def _is_whole(tap: _Link, bridge: _Link) -> bool:
    return tap.is_up and tap.master == bridge.index and _has_options(tap, PORT_OPTIONS)


def _has_options(link: _Link, wanted: Mapping[str, int]) -> bool:
    """Whether the kernel reports every option as wanted; what it does not know (`locked` before 5.16) is no reason to try again."""
    prefix = "IFLA_" if link.kind == "bridge" else "IFLA_BRPORT_"
    reported = {name: link.options.get(prefix + name.upper()) for name in wanted}
    return all(reported[name] in (None, value) for name, value in wanted.items()) and any(
        value is not None for value in reported.values()
    )


async def _set_neighbours(netlink: Any, bridge: _Link, wanted: Iterable[tuple[IPv4Address, str]]) -> None:
    """Makes the bridge's permanent neighbours those that the rules allow, so that both are mended and removed together."""
    known = set()
    async for message in await netlink.neigh("dump", ifindex=bridge.index, family=socket.AF_INET):
        if message["ifindex"] == bridge.index and message["state"] == NUD_PERMANENT:
            known.add((IPv4Address(message.get("dst")), message.get("lladdr")))
    wanted = set(wanted)
    for address, _ in known - wanted:
        await netlink.neigh("del", dst=str(address), ifindex=bridge.index)
    for address, mac in wanted - known:
        await _ensure_neighbour(netlink, bridge, address, mac)


async def _ensure_neighbour(netlink: Any, bridge: _Link, address: IPv4Address, mac: str) -> None:
    await netlink.neigh("replace", ifindex=bridge.index, state=NUD_PERMANENT, dst=str(address), lladdr=mac)


def _disable_ipv6(device: str) -> None:
    switch = IPV6_CONF / device / "disable_ipv6"
    # A kernel without IPv6 has no such file, and nothing to switch off.
    if switch.exists() and switch.read_text().strip() != "1":
        switch.write_text("1")


async def _list_rules() -> ruleset.Listing:
    texts = [await _run_nft("", "list", "ruleset", family) for family in ruleset.FAMILIES]
    try:
        return ruleset.parse_listing(*texts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"nft lists what this version cannot read: {error!r}"
        raise HostFaultError("rules_failed", message, "install nftables 1.0 or later") from error


async def _apply(commands: Iterable[ruleset.Command]) -> None:
    """Takes over all commands at once, or none."""
    commands = tuple(commands)
    if commands:
        await _run_nft(ruleset.render(commands), "-f", "-")


async def _run_nft(text: str, *arguments: str) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            "nft", "-j", *arguments, stdin=PIPE if text else DEVNULL, stdout=PIPE, stderr=PIPE
        )
    except OSError as error:
        raise HostFaultError("rules_failed", f"nft does not start: {error.strerror}", "install nftables") from error
    try:
        async with asyncio.timeout(STEP_TIMEOUT_S):
            output, words = await process.communicate(text.encode() if text else None)
    except TimeoutError as error:
        raise HostFaultError("rules_failed", f"nft hung for {STEP_TIMEOUT_S:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        tail = (words or output)[-TAIL_CHARS:].decode("utf-8", "replace").strip()
        raise HostFaultError("rules_failed", f"nft ended with code {process.returncode}: {tail}")
    return output.decode("utf-8", "replace")
