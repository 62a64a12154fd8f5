"""hostd's configuration file, as frozen dataclasses; docs/operator.md shows one with comments."""

import pwd
from dataclasses import dataclass, field
from ipaddress import IPv4Interface
from pathlib import Path

from fleet.errors import InvalidSpecError
from fleet.identity import TlsFiles
from fleet.model.ids import is_dns_label
from hostd.drivers.domain_xml import QemuUser
from hostd.inventory import InventorySettings
from hostd.room import SourceSettings

# What becomes of VMs whose host cannot renew its lease: ended, to be placed anew; or run on, and nobody places them anew.
KILL, KEEP = "kill", "keep"
LOG_LEVELS = ("debug", "info", "warning", "error")
# The bridge, one sandbox, the network's own and its broadcast address.
PREFIX_MAX = 30
# Addresses to listen on that nobody can call.
ANYWHERE = frozenset({"0.0.0.0", "[::]"})  # noqa: S104


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """The bridge of this host's sandboxes and its address; the subnet is theirs alone and need not be routed."""

    bridge: str = "bedplate0"
    address: str = "10.77.0.1/16"

    def interface(self) -> IPv4Interface:
        """The parsed address; raises InvalidSpecError."""
        try:
            interface = IPv4Interface(self.address)
            if interface.network.prefixlen > PREFIX_MAX:
                raise ValueError(self.address)
            return interface
        except ValueError as error:
            message = f"{self.address!r} is no address with a prefix of at most {PREFIX_MAX}"
            raise InvalidSpecError("config_invalid", message, "write 10.77.0.1/16", field="network.address") from error


@dataclass(frozen=True, slots=True)
class HostdConfig:
    """One host's configuration. `qemu_user` is a name or a number; `advertise` is where others reach `listen`, if not there.

    `schedulers` are asked for a new certificate before this one ends.
    """

    host_id: str
    etcd: tuple[str, ...]
    tls: TlsFiles
    listen: str = "0.0.0.0:7611"
    advertise: str = ""
    schedulers: tuple[str, ...] = ()
    libvirt_uri: str = "qemu:///system"
    qemu_user: str = "libvirt-qemu"
    images_dir: Path = Path("/var/lib/bedplate/images")
    state_dir: Path = Path("/var/lib/bedplate/hostd")
    run_dir: Path = Path("/run/bedplate")
    log_dir: Path = Path("/var/log/bedplate")
    log_level: str = "info"
    fencing: str = KILL
    network: NetworkConfig = NetworkConfig()
    inventory: InventorySettings = field(default_factory=InventorySettings)
    sources: SourceSettings = field(default_factory=SourceSettings)

    def check(self) -> None:
        """Raises InvalidSpecError for what the types alone do not say."""
        if not is_dns_label(self.host_id):
            message = f"{self.host_id!r} is no DNS label"
            raise InvalidSpecError("config_invalid", message, "use 1 to 63 of a-z, 0-9 and -", field="host_id")
        if not self.advertise and self.listen.rsplit(":", 1)[0] in ANYWHERE:
            message = f"nobody reaches this host at {self.listen}"
            next_step = 'set it to the "ip:port" where the scheduler and other hosts do'
            raise InvalidSpecError("config_invalid", message, next_step, field="advertise")
        if self.log_level not in LOG_LEVELS:
            message = f"{self.log_level!r} is no level"
            raise InvalidSpecError("config_invalid", message, f"use {', '.join(LOG_LEVELS)}", field="log_level")
        if self.fencing not in (KILL, KEEP):
            message = f"{self.fencing!r} is neither"
            raise InvalidSpecError("config_invalid", message, f'use "{KILL}" or "{KEEP}"', field="fencing")
        if not self.etcd:
            raise InvalidSpecError(
                "config_invalid", "no address is listed", 'list "ip:port" of each etcd', field="etcd"
            )
        self.network.interface()
        self.inventory.check()
        self.sources.check()

    def find_qemu_user(self) -> QemuUser:
        """The user by number; raises InvalidSpecError when this machine does not know the name."""
        if self.qemu_user.isdecimal():
            return QemuUser(int(self.qemu_user), int(self.qemu_user))
        try:
            entry = pwd.getpwnam(self.qemu_user)
        except KeyError as error:
            message = f"this machine has no user {self.qemu_user!r}"
            next_step = "install libvirt-daemon-system, or name another unprivileged user"
            raise InvalidSpecError("config_invalid", message, next_step, field="qemu_user") from error
        return QemuUser(entry.pw_uid, entry.pw_gid)
