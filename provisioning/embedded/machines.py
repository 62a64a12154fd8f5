"""Machines of an embedded rack: each a network namespace on one bridge, with a /run of its own; the way between any two can be cut.

    desk (this namespace, rack0, 10.88.0.254) -- rk-<name> == eth0 (10.88.0.n, machine <name>)

To be used in private mount, network and process namespaces (`./dev private`).
"""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path

from fleet.errors import HostFaultError

BRIDGE = "rack0"
NETWORK = IPv4Network("10.88.0.0/24")
DESK, DESK_ADDRESS = "desk", "10.88.0.254"
# Kernel names of links have 15 characters.
LINK_PREFIX, NAME_CHARS_MAX = "rk-", 12
COMMAND_TIMEOUT_S = 30.0
# Holds the namespaces open: it says so when /run is its own and the loopback is up, and ends when its stdin does.
_HOLDER = """set -e
mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs /run
mkdir -m 1777 /run/lock
ip link set lo up
echo held
read -r _ || true
"""
# What comes from a listed address vanishes before anything sees it, as behind a switch that drops it: no reset, no ICMP.
_CUTS = """add table inet cuts
add set inet cuts from { type ipv4_addr; }
add chain inet cuts input { type filter hook input priority -300; }
add rule inet cuts input ip saddr @from drop
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine: its name, its address, and the process that holds its namespaces."""

    name: str
    address: str
    holder: "subprocess.Popen[bytes]" = field(repr=False)

    def within(self) -> tuple[str, ...]:
        """What to put before a command line so that it runs on this machine, in this folder; the process is the command's own."""
        return ("nsenter", "--target", str(self.holder.pid), "--mount", "--net", f"--wd={Path.cwd()}", "--")


class Rack:
    """The bridge and the machines on it."""

    def __init__(self) -> None:
        self.machines: dict[str, Machine] = {}
        _run("ip", "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0")
        _run("ip", "address", "add", f"{DESK_ADDRESS}/{NETWORK.prefixlen}", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")

    def add(self, name: str) -> Machine:
        """A new machine on the bridge; raises HostFaultError `rack_failed`."""
        assert len(name) <= NAME_CHARS_MAX
        address = str(NETWORK[len(self.machines) + 1])
        holder = subprocess.Popen(
            ["unshare", "--mount", "--net", "sh", "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        if holder.stdout.readline() != b"held\n":
            raise HostFaultError("rack_failed", f"the namespaces of {name} were not made", "run it as root")
        machine = Machine(name, address, holder)
        link = LINK_PREFIX + name
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        _run("ip", "link", "set", link, "master", BRIDGE, "up")
        _run(*machine.within(), "ip", "address", "add", f"{address}/{NETWORK.prefixlen}", "dev", "eth0")
        _run(*machine.within(), "ip", "link", "set", "eth0", "up")
        _run(*machine.within(), "nft", "-f", "-", given=_CUTS)
        self.machines[name] = machine
        return machine

    def cut(self, source: str, target: str) -> None:
        """From now on what `source` (a machine, or DESK) sends to `target` vanishes; the other direction stays."""
        address = DESK_ADDRESS if source == DESK else self.machines[source].address
        _run(*self.machines[target].within(), "nft", "add", "element", "inet", "cuts", "from", f"{{ {address} }}")

    def heal(self) -> None:
        """Nothing is cut any more."""
        for machine in self.machines.values():
            _run(*machine.within(), "nft", "flush", "set", "inet", "cuts", "from")

    def stop(self) -> None:
        """Takes the machines and the bridge away; what runs on a machine must have ended."""
        for machine in self.machines.values():
            # With its namespace alone it would go some time later.
            _run("ip", "link", "delete", LINK_PREFIX + machine.name)
            assert machine.holder.stdin is not None
            assert machine.holder.stdout is not None
            machine.holder.stdin.close()
            machine.holder.stdout.close()
            machine.holder.wait(COMMAND_TIMEOUT_S)
        _run("ip", "link", "delete", BRIDGE)


def _run(*arguments: str, given: str = "") -> None:
    command: Sequence[str] = arguments
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode != 0:
        message = f"{' '.join(arguments)}: {done.stderr.strip()}"
        raise HostFaultError("rack_failed", message, "run it as root in private namespaces: ./dev private")
