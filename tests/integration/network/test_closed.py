"""Mode `closed`, frame by frame: raw frames go into a sandbox's tap, and nothing comes out anywhere."""

import fcntl
import json
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address

import pytest

from fleet.model.ids import SandboxId
from hostd.drivers.network import LinuxNetwork, NetworkSettings
from hostd.reconcile.state import Port, mac_address

pytestmark = pytest.mark.root

TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI = 0x0002 | 0x1000
HOST, BROADCAST = "10.77.0.1", "ff:ff:ff:ff:ff:ff"
ADDRESS_A, ADDRESS_B, STRANGER = "10.77.0.2", "10.77.0.3", "10.77.0.9"
MAC_HOST, MAC_A, MAC_B, MAC_STRANGER = (
    mac_address(IPv4Address(text)) for text in (HOST, ADDRESS_A, ADDRESS_B, STRANGER)
)
# Group addresses that bridges keep to themselves (IEEE 802.1D table 7-10): they would go around the bridge's prerouting.
MAC_LINK_LOCAL = "01:80:c2:00:00:{:02x}"
ETHERTYPE_IPV4, ETHERTYPE_ARP, ETHERTYPE_VLAN, ETHERTYPE_IPV6, ETHERTYPE_LLDP = 0x0800, 0x0806, 0x8100, 0x86DD, 0x88CC
UDP_PORT = 4242


def port(sandbox_id: str, address: str) -> Port:
    return Port(SandboxId(sandbox_id), mac_address(IPv4Address(address)), IPv4Address(address), 16)


PORT_A, PORT_B = port("aaaaaaaaaaaa", ADDRESS_A), port("bbbbbbbbbbbb", ADDRESS_B)


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(target: str, source: str, ethertype: int, payload: bytes) -> bytes:
    return mac(target) + mac(source) + struct.pack(">H", ethertype) + payload.ljust(46, b"\0")


def checksum(content: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(content) // 2}H", content))
    total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - ((total + (total >> 16)) & 0xFFFF)


def udp(source: str, target: str, source_port: int = 1000, target_port: int = UDP_PORT) -> bytes:
    body = struct.pack(">HHHH", source_port, target_port, 8 + 5, 0) + b"hello"
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + body


def arp(sender_mac: str, sender: str, target: str) -> bytes:
    head = struct.pack(">HHBBH", 1, ETHERTYPE_IPV4, 6, 4, 1)
    return head + mac(sender_mac) + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(target)


def neighbour_solicitation() -> bytes:
    return struct.pack(">IHBB", 0x60000000, 8, 58, 255) + bytes(15) + b"\1" + b"\xff\2" + bytes(13) + b"\1" + bytes(8)


HONEST = ethernet(MAC_HOST, MAC_A, ETHERTYPE_IPV4, udp(ADDRESS_A, HOST))
FRAMES = {
    "udp to the host": (HONEST, "closed"),
    "udp to a sandbox": (ethernet(MAC_B, MAC_A, ETHERTYPE_IPV4, udp(ADDRESS_A, ADDRESS_B)), "closed"),
    "udp to all": (ethernet(BROADCAST, MAC_A, ETHERTYPE_IPV4, udp(ADDRESS_A, "255.255.255.255")), "closed"),
    "arp for a sandbox": (ethernet(BROADCAST, MAC_A, ETHERTYPE_ARP, arp(MAC_A, ADDRESS_A, ADDRESS_B)), "closed"),
    "dhcp": (ethernet(BROADCAST, MAC_A, ETHERTYPE_IPV4, udp("0.0.0.0", "255.255.255.255", 68, 67)), "wrong_ip"),
    "spoofed mac": (ethernet(MAC_HOST, MAC_STRANGER, ETHERTYPE_IPV4, udp(ADDRESS_A, HOST)), "wrong_mac"),
    "spoofed ip": (ethernet(MAC_HOST, MAC_A, ETHERTYPE_IPV4, udp(STRANGER, HOST)), "wrong_ip"),
    "spoofed arp mac": (ethernet(BROADCAST, MAC_A, ETHERTYPE_ARP, arp(MAC_B, ADDRESS_A, HOST)), "wrong_arp_mac"),
    "spoofed arp ip": (ethernet(BROADCAST, MAC_A, ETHERTYPE_ARP, arp(MAC_A, HOST, ADDRESS_B)), "wrong_arp_ip"),
    "ipv6": (ethernet("33:33:00:00:00:01", MAC_A, ETHERTYPE_IPV6, neighbour_solicitation()), "ipv6"),
    "vlan": (
        ethernet(MAC_HOST, MAC_A, ETHERTYPE_VLAN, struct.pack(">HH", 7, ETHERTYPE_IPV4) + udp(ADDRESS_A, HOST)),
        "wrong_ethertype",
    ),
    "vlan 0": (
        ethernet(MAC_HOST, MAC_A, ETHERTYPE_VLAN, struct.pack(">HH", 0, ETHERTYPE_IPV4) + udp(ADDRESS_A, HOST)),
        "wrong_ethertype",
    ),
    "lldp to a sandbox": (ethernet(MAC_B, MAC_A, ETHERTYPE_LLDP, b"\2\7\4"), "wrong_ethertype"),
}


@dataclass(frozen=True, slots=True)
class Guest:
    """What QEMU is to a tap: a file descriptor that sends and receives whole frames."""

    descriptor: int

    def send(self, frame: bytes) -> None:
        assert os.write(self.descriptor, frame) == len(frame)

    def received(self) -> list[bytes]:
        frames = []
        while True:
            try:
                frames.append(os.read(self.descriptor, 4096))
            except BlockingIOError:
                return frames


@dataclass(frozen=True, slots=True)
class Host:
    """A service of the host that listens everywhere, and what root sees on the bridge."""

    service: socket.socket
    sniffer: socket.socket

    def received(self) -> list[bytes]:
        frames = []
        for listener in (self.service, self.sniffer):
            try:
                frames.append(listener.recv(4096))
            except BlockingIOError:
                continue
        return frames


def open_tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP_NO_PI))
    return descriptor


def nft(*arguments: str) -> str:
    return subprocess.run(["nft", *arguments], check=True, capture_output=True, text=True).stdout


def base_drops() -> dict[str, int]:
    """Frames dropped by the base chains: "family/chain/cause" to packets."""
    drops = {}
    for entry in json.loads(nft("-j", "list", "ruleset"))["nftables"]:
        rule = entry.get("rule")
        if rule and not rule["chain"].startswith("sandbox-"):
            counters = [expression["counter"]["packets"] for expression in rule["expr"] if "counter" in expression]
            drops[f"{rule['family']}/{rule['chain']}/{rule['comment']}"] = sum(counters)
    return {name: packets for name, packets in drops.items() if packets}


@pytest.fixture
async def guests(network: LinuxNetwork) -> AsyncIterator[tuple[Guest, Guest]]:
    """Two sandboxes' ports with somebody at the other end of each."""
    with ExitStack() as stack:
        opened = []
        for wanted in (PORT_A, PORT_B):
            await network.ensure_port(wanted)
            opened.append(Guest(open_tap(wanted.tap)))
            stack.callback(os.close, opened[-1].descriptor)
        yield opened[0], opened[1]


@pytest.fixture
def host(guests: tuple[Guest, Guest], settings: NetworkSettings) -> Iterator[Host]:
    """Listeners on the host's side."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)) as sniffer,
    ):
        service.bind(("0.0.0.0", UDP_PORT))
        sniffer.bind((settings.bridge, 0x0003))
        for listener in (service, sniffer):
            listener.setblocking(False)
        yield Host(service, sniffer)


@pytest.mark.parametrize("kind", sorted(FRAMES))
async def test_a_frame_goes_nowhere_and_is_counted_once(
    network: LinuxNetwork, guests: tuple[Guest, Guest], host: Host, kind: str
) -> None:
    """Whatever a guest sends, neither the host nor another sandbox receives it, and exactly its cause is counted."""
    frame, cause = FRAMES[kind]
    guests[0].send(frame)
    drops = (await network.list_drops())[PORT_A.sandbox_id]
    assert {name: packets for name, packets in drops.items() if packets} == {cause: 1}
    assert (guests[1].received(), host.received()) == ([], [])
    assert not any((await network.list_drops())[PORT_B.sandbox_id].values())


async def test_the_listeners_would_notice(guests: tuple[Guest, Guest], host: Host) -> None:
    """Without rules an honest frame reaches the host: so the tests above prove what they say."""
    nft("flush", "ruleset")
    guests[0].send(HONEST)
    assert host.service.recv(100) == b"hello"


async def test_the_ports_hold_without_rules(guests: tuple[Guest, Guest], host: Host) -> None:
    """With all rules gone the bridge's ports still keep sandboxes apart and refuse a foreign MAC address."""
    nft("flush", "ruleset")
    for kind in ("udp to a sandbox", "udp to all", "arp for a sandbox", "spoofed mac"):
        guests[0].send(FRAMES[kind][0])
        assert guests[1].received() == [], kind
    assert all(frame[6:12] != mac(MAC_STRANGER) for frame in host.received())


async def test_link_local_frames_do_not_go_around(
    network: LinuxNetwork, guests: tuple[Guest, Guest], host: Host
) -> None:
    """Packets in frames to a bridge's own group addresses, which may skip prerouting, do not reach the host or a sandbox either."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE_IPV4)) as stack:
        stack.bind((PORT_A.tap, ETHERTYPE_IPV4))
        stack.setblocking(False)
        for last in range(16):
            target = MAC_LINK_LOCAL.format(last)
            guests[0].send(ethernet(target, MAC_A, ETHERTYPE_IPV4, udp(ADDRESS_A, HOST)))
            guests[0].send(ethernet(target, MAC_A, ETHERTYPE_ARP, arp(MAC_A, ADDRESS_A, HOST)))
            assert (host.received(), guests[0].received(), guests[1].received()) == ([], [], []), target
        with pytest.raises(BlockingIOError):
            stack.recv(4096)
    # The bridge itself drops :01 (pause frames) and keeps :02 (LACP).
    assert (await network.list_drops())[PORT_A.sandbox_id]["closed"] == 14 * 2
    assert base_drops() == {"bridge/input/to_host": 2}


async def test_the_host_does_not_reach_a_guest(
    guests: tuple[Guest, Guest], host: Host, settings: NetworkSettings
) -> None:
    """Neither a service of the host nor a raw frame on the bridge reaches a sandbox."""
    with pytest.raises(PermissionError):
        host.service.sendto(b"hello", (ADDRESS_A, UDP_PORT))
    host.sniffer.send(ethernet(MAC_A, MAC_HOST, ETHERTYPE_IPV4, udp(HOST, ADDRESS_A)))
    assert guests[0].received() == []
    assert base_drops() == {"inet/output/to_bridge": 1, "bridge/output/to_guest": 1}


async def test_a_tap_without_a_chain_has_no_way(guests: tuple[Guest, Guest], host: Host) -> None:
    """A tap that no element leads on from is dropped by default, not let through by default."""
    nft("delete", "element", "bridge", "bedplate", "taps", "{", f'"{PORT_A.tap}"', "}")
    guests[0].send(HONEST)
    assert host.received() == []
    assert base_drops() == {"bridge/prerouting/no_way": 1}
