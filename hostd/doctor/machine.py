"""The machine itself: user, programs, kernel, memory. Knows neither configuration nor fleet."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from hostd.doctor.command import run
from hostd.doctor.finding import Finding, fail, ok, warn

# The versions that are tested; older ones may do, and nobody has seen them do it.
QEMU_MAJOR_MIN = 7
KERNEL_MIN = (5, 15)
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mkfs.erofs": "erofs-utils",
    "mke2fs": "e2fsprogs",
    "nft": "nftables",
}
BINDINGS = {"libvirt": "libvirt-python", "pyroute2": "pyroute2"}
TUN = Path("/dev/net/tun")
MEMORY_MIB_MIN = 2048

# Each is tried in a network namespace of its own, which ends with the command.
_FEATURES = (
    ("bridge", ("ip", "link", "add", "bp-doctor", "type", "bridge"), "load the kernel module bridge"),
    ("tap", ("ip", "tuntap", "add", "bp-doctor", "mode", "tap"), "load the kernel module tun"),
    ("nft inet", ("nft", "add", "table", "inet", "bp_doctor"), "load the kernel module nf_tables"),
    ("nft bridge", ("nft", "add", "table", "bridge", "bp_doctor"), "load the kernel module nf_tables_bridge"),
    ("nft netdev", ("nft", "add", "table", "netdev", "bp_doctor"), "load the kernel module nf_tables"),
)
_VERSION = re.compile(r"version (\d+)\.(\d+)")


def check_machine(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Iterator[Finding]:
    """Everything about the machine."""
    yield _check_user()
    yield from _check_programs()
    yield _check_kernel()
    yield from _check_features()
    yield _check_memory(proc)
    yield _check_swap(proc)
    yield _check_hugepages(proc)
    yield _check_ksm(sys)
    yield _check_cgroups(proc, sys)


def _check_user() -> Finding:
    if os.geteuid() == 0:
        return ok("user", "root")
    return fail("user", f"user number {os.geteuid()}", "run it as root, as hostd must be")


def _check_programs() -> Iterator[Finding]:
    missing = {package for program, package in PROGRAMS.items() if shutil.which(program) is None}
    if missing:
        yield fail("programs", f"missing: {', '.join(sorted(missing))}", f"apt-get install {' '.join(sorted(missing))}")
    else:
        yield ok("programs", ", ".join(PROGRAMS))
    absent = [package for module, package in BINDINGS.items() if find_spec(module) is None]
    if absent:
        yield fail("python", f"missing: {', '.join(absent)}", 'install Bedplate with its extra: "bedplate[host]"')
    else:
        yield ok("python", f"{platform.python_version()} with {', '.join(BINDINGS.values())}")
    if shutil.which("qemu-system-x86_64") is not None:
        yield _check_qemu()


def _check_qemu() -> Finding:
    ended = run("qemu-system-x86_64", "--version")
    found = _VERSION.search(ended.output)
    if ended.code != 0 or found is None:
        return fail("qemu", f"it does not say its version: {ended.output}", "install qemu-system-x86 anew")
    if int(found[1]) < QEMU_MAJOR_MIN:
        return warn("qemu", ended.first_line, f"take {QEMU_MAJOR_MIN}.0 or later: older ones are not tested")
    return ok("qemu", ended.first_line)


def _check_kernel() -> Finding:
    release = platform.release()
    numbers = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if numbers < KERNEL_MIN:
        least = ".".join(map(str, KERNEL_MIN))
        return warn("kernel", release, f"take {least} or later: older ones are not tested")
    return ok("kernel", release)


def _check_features() -> Iterator[Finding]:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        yield warn("network", "not tried: unshare or ip is missing", "apt-get install util-linux iproute2")
        return
    namespace = run("unshare", "--net", "true")
    if namespace.code != 0:
        yield fail(
            "namespaces", f"no network namespace can be made: {namespace.output}", "run it as root, outside a container"
        )
        return
    yield ok("namespaces", "network namespaces can be made")
    if not TUN.is_char_device():
        yield fail("tun", f"there is no device {TUN}", "load the kernel module tun")
    for name, command, next_step in _FEATURES:
        ended = run("unshare", "--net", *command)
        if ended.code != 0:
            yield fail(name, f"{' '.join(command[:3])} fails: {ended.output}", next_step)
    yield from _check_isolation()


def _check_isolation() -> Iterator[Finding]:
    """Ports that are closed off against each other are what keeps sandboxes apart."""
    script = (
        "ip link add bp-doctor type bridge && ip tuntap add bp-doctor0 mode tap"
        " && ip link set bp-doctor0 master bp-doctor && ip link set bp-doctor0 type bridge_slave isolated on"
    )
    ended = run("unshare", "--net", "sh", "-c", script)
    if ended.code == 0:
        yield ok("network", "bridge, taps with isolation, nft")
    else:
        yield fail(
            "network", f"no isolated port can be made: {ended.output}", "take a kernel with bridge port isolation"
        )


def _check_memory(proc: Path) -> Finding:
    amounts = _meminfo(proc)
    total_mib, free_mib = amounts.get("MemTotal", 0) // 1024, amounts.get("MemAvailable", 0) // 1024
    found = f"{total_mib} MiB, {free_mib} MiB of it available"
    if total_mib < MEMORY_MIB_MIN:
        return fail("memory", found, f"a host needs {MEMORY_MIB_MIN} MiB: half of it is its own share")
    return ok("memory", found)


def _check_swap(proc: Path) -> Finding:
    lines = _read(proc / "swaps").splitlines()[1:]
    # zram keeps what is swapped out in memory, compressed.
    disks = [line.split()[0] for line in lines if line.split() and not line.startswith("/dev/zram")]
    if disks:
        next_step = "swapoff -a and take it out of /etc/fstab: secrets in a VM's memory may reach a disk"
        return warn("swap", f"on: {', '.join(disks)}", next_step)
    return ok("swap", "off")


def _check_hugepages(proc: Path) -> Finding:
    amounts = _meminfo(proc)
    reserved_mib = amounts.get("HugePages_Total", 0) * amounts.get("Hugepagesize", 0) // 1024
    if reserved_mib:
        return warn(
            "hugepages", f"{reserved_mib} MiB are reserved", "set vm.nr_hugepages to 0: sandboxes do not use them"
        )
    return ok("hugepages", "none are reserved")


def _check_ksm(sys: Path) -> Finding:
    if _read(sys / "kernel/mm/ksm/run").strip() == "1":
        next_step = "echo 2 > /sys/kernel/mm/ksm/run: by it one VM can learn what another's memory holds"
        return warn("ksm", "equal pages of VMs are merged", next_step)
    return ok("ksm", "off")


def _check_cgroups(proc: Path, sys: Path) -> Finding:
    wanted = {"cpu", "memory"}
    unified = set(_read(sys / "fs/cgroup/cgroup.controllers").split())
    rows = [line.split() for line in _read(proc / "cgroups").splitlines() if not line.startswith("#")]
    legacy = {row[0] for row in rows if len(row) == 4 and row[3] == "1"}
    missing = wanted - unified - legacy
    if missing:
        next_step = "enable them on the kernel's command line (cgroup_enable=memory): VMs have limits by them"
        return fail("cgroups", f"not there: {', '.join(sorted(missing))}", next_step)
    return ok("cgroups", "version 2" if wanted <= unified else "version 1")


def _meminfo(proc: Path) -> dict[str, int]:
    """Amounts of /proc/meminfo, in KiB or as counts."""
    rows = (line.replace(":", "").split() for line in _read(proc / "meminfo").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdecimal()}


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
