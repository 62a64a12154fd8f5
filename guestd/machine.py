"""This guest as a machine: its name, clock, network address and end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from _socket import AF_INET, SOCK_DGRAM, inet_aton, socket

from guestd.fault import GuestFault
from guestd.kernel import power_off

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestd.configuration import Address, Configuration

# A remount takes milliseconds; one that hangs must not keep the guest, and the journal heals what it left.
REMOUNT_TRIES, REMOUNT_INTERVAL_S = 250, 0.02
NET_DIR = "/sys/class/net"
# Two times of /proc/uptime, written by provisioning/guest/initramfs-init.
BOOT_FILE = "/run/bedplate/boot"
# The host's clock and ours were read some milliseconds apart; less than this is no error worth a step.
CLOCK_ERROR_S = 1.0

_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
# struct ifreq of netdevice(7): a name, then a union of 24 bytes.
_NAME_BYTES = 16
_IFREQ = struct.Struct("16s24s")


def prepare_machine(configuration: Configuration) -> None:
    """Name and network as the host says; raises GuestFault `machine_failed`. Safe to repeat."""
    try:
        _set_hostname(configuration.hostname)
        _disable_ipv6()
        with contextlib.closing(socket(AF_INET, SOCK_DGRAM)) as control:
            _bring_up(control.fileno(), "lo")
            if configuration.address is not None:
                _set_address(control.fileno(), configuration.address)
    except OSError as error:
        raise GuestFault("machine_failed", f"the guest's name or network cannot be set: {error}") from error


def set_clock(clock_ms: int) -> None:
    """Step the clock to the host's time, unless it is right."""
    now_s = clock_ms / 1000
    if abs(time.time() - now_s) > CLOCK_ERROR_S:
        time.clock_settime(time.CLOCK_REALTIME, now_s)


def end_machine(mounts: str = "/proc/self/mounts", trigger: str = "/proc/sysrq-trigger") -> None:
    """What was written is on the disk, whose filesystem is left clean, and the power goes off."""
    os.sync()
    # No ordinary remount: the root itself is on that disk, with files open for writing. The kernel's own (sysrq u) forces it, and
    # does it on a thread of its own.
    with contextlib.suppress(OSError):
        with open(trigger, "w") as stream:
            stream.write("u")
        for _ in range(REMOUNT_TRIES):
            if not _has_writable_ext4(mounts):
                break
            time.sleep(REMOUNT_INTERVAL_S)
    power_off()


def _has_writable_ext4(mounts: str) -> bool:
    with open(mounts) as stream:
        return any(line.split()[2] == "ext4" and line.split()[3].split(",")[0] == "rw" for line in stream)


def read_boot_id() -> str:
    """The kernel's name of this boot."""
    with open("/proc/sys/kernel/random/boot_id") as stream:
        return stream.read().strip()


def measure_boot() -> dict[str, int]:
    """How long the kernel has run, and had run when the initramfs and when the real root began, in milliseconds."""
    boot = {"uptime_ms": int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000), "init_ms": 0, "root_ms": 0}
    with contextlib.suppress(FileNotFoundError), open(BOOT_FILE) as stream:
        boot["init_ms"], boot["root_ms"] = (int(float(word) * 1000) for word in stream.read().split())
    return boot


def measure_memory_mib() -> int:
    """Memory of the whole guest that is in use and cannot be had at once."""
    with open("/proc/meminfo") as stream:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in stream}
    return (kib["MemTotal"] - kib["MemAvailable"]) // 1024


def _set_hostname(hostname: str) -> None:
    # The file too: systemd, which starts behind us, takes the name from there.
    for path, text in (
        ("/etc/hostname", f"{hostname}\n"),
        ("/etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n"),
        ("/proc/sys/kernel/hostname", f"{hostname}\n"),
    ):
        ensure_text(path, text)


def ensure_text(path: str, text: str) -> None:
    """The file says so. One that does is left alone: a guestd that starts again may find the disk full by then. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as stream:
        if stream.read() == text:
            return
    with open(path, "w") as stream:
        stream.write(text)


def _disable_ipv6() -> None:
    for scope in ("all", "default"):
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "w") as stream,
        ):
            stream.write("1")


def _set_address(control: int, address: Address) -> None:
    device = _find_device(address.mac)
    mask = (0xFFFFFFFF << (32 - address.prefix)) & 0xFFFFFFFF
    fcntl.ioctl(control, _SIOCSIFADDR, _ifreq(device, _socket_address(inet_aton(address.ip))))
    fcntl.ioctl(control, _SIOCSIFNETMASK, _ifreq(device, _socket_address(mask.to_bytes(4, "big"))))
    _bring_up(control, device)


def _find_device(mac: str) -> str:
    for name in sorted(os.listdir(NET_DIR)):
        with open(f"{NET_DIR}/{name}/address") as stream:
            if stream.read().strip() == mac:
                return name
    raise FileNotFoundError(f"no network device has the address {mac}")


def _bring_up(control: int, device: str) -> None:
    found = fcntl.ioctl(control, _SIOCGIFFLAGS, _ifreq(device, b""))
    (flags,) = struct.unpack_from("=h", found, _NAME_BYTES)
    fcntl.ioctl(control, _SIOCSIFFLAGS, _ifreq(device, struct.pack("=h", flags | _IFF_UP)))


def _ifreq(device: str, content: bytes) -> bytes:
    return _IFREQ.pack(device.encode(), content)


def _socket_address(address: bytes) -> bytes:
    return struct.pack("=HH4s8x", AF_INET, 0, address)
