"""The libvirt domain of one machine, as XML. PURE: the same machine gives the same text.

q35 with virtio devices only, no display, no USB, no sound: what is not there cannot be attacked. Files are never relabelled: hostd
has given them to QEMU's user already, and shared images stay root's. Source: https://libvirt.org/formatdomain.html.
"""

from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from fleet.model.host import TCG_BUFFER_MIB, Accelerator
from fleet.model.ids import SandboxId, is_sandbox_id
from hostd.reconcile.state import Machine, Port

DOMAIN_PREFIX = "bp-"
LINK_NAME = "org.bedplate.guest.0"
# cpu.cfs_period_us: the kernel's default; a quota is counted against it.
CPU_PERIOD_US = 100_000
# An emulated CPU has no speculation to defend and no stable TSC to calibrate; both cost seconds of a boot.
TCG_CMDLINE = "mitigations=off tsc=reliable no_timer_check"
# What one guest may draw from the host's entropy: plenty for keys, no way to drain others.
ENTROPY_BYTES, ENTROPY_PERIOD_MS = 4096, 100


@dataclass(frozen=True, slots=True)
class QemuUser:
    """The unprivileged user and group that QEMU runs as, by number."""

    uid: int
    gid: int


def memory_limit_kib(machine: Machine) -> int:
    """What the domain's cgroup may hold at most: the guest's memory and the VMM's own.

    Set on the paused domain and not in its XML: there libvirt would also raise QEMU's locked-memory limit to it, which a libvirtd
    without CAP_SYS_RESOURCE may not, and which an unprivileged QEMU has no use for.
    """
    return (machine.memory_mib + machine.overhead_mib) * 1024


def domain_name(sandbox_id: SandboxId) -> str:
    """The domain's name in libvirt."""
    return DOMAIN_PREFIX + sandbox_id


def parse_domain_name(name: str) -> SandboxId | None:
    """The sandbox behind a domain's name, or None when the domain is not ours."""
    text = name.removeprefix(DOMAIN_PREFIX)
    return SandboxId(text) if name != text and is_sandbox_id(text) else None


def render_domain(machine: Machine, user: QemuUser) -> str:
    """The XML of a machine's domain."""
    is_kvm = machine.accelerator is Accelerator.KVM
    domain = Element("domain", type="kvm" if is_kvm else "qemu")
    _text(domain, "name", domain_name(machine.sandbox_id))
    _text(domain, "genid", machine.generation_id)
    _text(domain, "title", f"{machine.tenant}/{machine.sandbox_id}")
    _add_limits(domain, machine)
    _add_boot(domain, machine, is_kvm=is_kvm)
    _add_cpu(domain, is_kvm=is_kvm)
    for event, outcome in (("on_poweroff", "destroy"), ("on_reboot", "destroy"), ("on_crash", "destroy")):
        _text(domain, event, outcome)
    _add_devices(SubElement(domain, "devices"), machine)
    label = SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
    _text(label, "label", f"+{user.uid}:+{user.gid}")
    return tostring(domain, encoding="unicode")


def _add_limits(domain: Element, machine: Machine) -> None:
    _text(domain, "vcpu", str(machine.vcpus), placement="static")
    # Guest memory goes into no core dump and is never merged with another tenant's (a timing channel).
    _text(domain, "memory", str(machine.memory_mib), unit="MiB", dumpCore="off")
    backing = SubElement(domain, "memoryBacking")
    SubElement(backing, "nosharepages")
    tune = SubElement(domain, "cputune")
    _text(tune, "global_period", str(CPU_PERIOD_US))
    _text(tune, "global_quota", str(machine.vcpus * CPU_PERIOD_US))


def _add_boot(domain: Element, machine: Machine, *, is_kvm: bool) -> None:
    boot = SubElement(domain, "os")
    _text(boot, "type", "hvm", arch="x86_64", machine="q35")
    _text(boot, "kernel", machine.boot.kernel)
    _text(boot, "initrd", machine.boot.initramfs)
    _text(boot, "cmdline", machine.boot.cmdline if is_kvm else f"{machine.boot.cmdline} {TCG_CMDLINE}")
    features = SubElement(domain, "features")
    SubElement(features, "acpi")
    SubElement(features, "apic")
    if not is_kvm:
        _text(SubElement(features, "tcg"), "tb-cache", str(TCG_BUFFER_MIB), unit="MiB")


def _add_cpu(domain: Element, *, is_kvm: bool) -> None:
    SubElement(domain, "cpu", mode="host-passthrough" if is_kvm else "maximum", migratable="off")
    SubElement(domain, "clock", offset="utc")


def _add_devices(devices: Element, machine: Machine) -> None:
    _text(devices, "emulator", "/usr/bin/qemu-system-x86_64")
    _add_disk(devices, "root", machine.boot.root, is_readonly=True)
    _add_disk(devices, "scratch", machine.scratch_path, is_readonly=False)
    for disk in machine.source_disks:
        _add_disk(devices, disk.serial, disk.path, is_readonly=True)
    if machine.port is not None:
        _add_interface(devices, machine.port)
    channel = SubElement(devices, "channel", type="unix")
    SubElement(channel, "source", mode="bind", path=machine.link_path)
    SubElement(channel, "target", type="virtio", name=LINK_NAME)
    # virtlogd stands between QEMU and the file, and bounds it.
    console = SubElement(devices, "serial", type="file")
    SubElement(console, "source", path=machine.console_path, append="on")
    entropy = SubElement(devices, "rng", model="virtio")
    SubElement(entropy, "rate", bytes=str(ENTROPY_BYTES), period=str(ENTROPY_PERIOD_MS))
    _text(entropy, "backend", "/dev/urandom", model="random")
    SubElement(devices, "controller", type="usb", model="none")
    SubElement(devices, "memballoon", model="none")


def _add_disk(devices: Element, serial: str, path: str, *, is_readonly: bool) -> None:
    disk = SubElement(devices, "disk", type="file", device="disk")
    # No guest waits for the host's disk: one that crashes takes the VM along, and a disk that is kept is synced once its VM ended.
    cache = {"cache": "writeback"} if is_readonly else {"cache": "unsafe", "discard": "unmap"}
    SubElement(disk, "driver", {"name": "qemu", "type": "raw", **cache})
    SubElement(disk, "source", file=path)
    SubElement(disk, "target", dev=_target(len(devices.findall("disk"))), bus="virtio")
    _text(disk, "serial", serial)
    if is_readonly:
        SubElement(disk, "readonly")


def _add_interface(devices: Element, port: Port) -> None:
    interface = SubElement(devices, "interface", type="ethernet")
    SubElement(interface, "mac", address=port.mac)
    # The tap exists already, with its rules before it.
    SubElement(interface, "target", dev=port.tap, managed="no")
    SubElement(interface, "model", type="virtio")


def _target(number: int) -> str:
    return "vd" + "abcdefghijklmnopqrstuvwxyz"[number - 1]


def _text(parent: Element, tag: str, text: str, **attributes: str) -> None:
    SubElement(parent, tag, attributes).text = text
