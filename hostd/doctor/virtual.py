"""What VMs run on: libvirt, the user of QEMU, and the accelerator that a probe guest boots on."""

import json
import os
import pwd
import sys
from collections.abc import Iterator
from pathlib import Path

from fleet.errors import BedplateError
from hostd.config import HostdConfig
from hostd.doctor.command import run
from hostd.doctor.finding import Finding, fail, ok, warn

KVM = Path("/dev/kvm")
# The probe guest has 20 s, and verifying an image before it takes some more.
PROBE_TIMEOUT_S = 90.0
# libvirt asks QEMU for its abilities at the first connection, which takes a minute where /dev/kvm does not work.
LIBVIRT_TIMEOUT_S = 90.0


def check_virtual(config: HostdConfig, config_path: Path) -> Iterator[Finding]:
    """libvirt and the accelerator."""
    yield _check_user(config)
    yield _check_libvirt(config)
    yield _check_accelerator(config_path)


def _check_user(config: HostdConfig) -> Finding:
    try:
        user = config.find_qemu_user()
    except BedplateError as error:
        return fail("qemu user", error.message, error.next_step)
    if user.uid == 0:
        return fail("qemu user", "root", "name an unprivileged user: a guest that breaks out is that user")
    if KVM.exists() and not _may_open(user.uid, user.gid):
        next_step = f"usermod -a -G kvm {config.qemu_user}, then restart libvirtd"
        return warn("qemu user", f"{config.qemu_user} may not open {KVM}: VMs would run emulated", next_step)
    return ok("qemu user", config.qemu_user)


def _may_open(uid: int, gid: int) -> bool:
    status = KVM.stat()
    try:
        groups = os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        groups = [gid]
    return bool(
        status.st_mode & 0o006 == 0o006
        or (status.st_uid == uid and status.st_mode & 0o600 == 0o600)
        or (status.st_gid in groups and status.st_mode & 0o060 == 0o060)
    )


def _check_libvirt(config: HostdConfig) -> Finding:
    ended = run("virsh", "--quiet", "--connect", config.libvirt_uri, "version", timeout_s=LIBVIRT_TIMEOUT_S)
    if ended.code == 0:
        running = [line.partition(":")[2].strip() for line in ended.output.splitlines() if line.startswith("Running")]
        return ok("libvirt", ", ".join([config.libvirt_uri, *running]))
    if ended.code is None:
        return fail("libvirt", f"virsh: {ended.output}", "apt-get install libvirt-daemon-system libvirt-clients")
    next_step = "systemctl start libvirtd; see its log, and libvirt_uri in the configuration"
    return fail("libvirt", f"{config.libvirt_uri}: {ended.output}", next_step)


def _check_accelerator(config_path: Path) -> Finding:
    """hostd's own probe, in a process of its own: it needs libvirt's binding, which may be what is missing."""
    arguments = [sys.executable, "-m", "hostd", "--config", str(config_path), "probe"]
    ended = run(*arguments, timeout_s=PROBE_TIMEOUT_S)
    try:
        answer = json.loads(ended.stdout)
        accelerator, reason = str(answer["accelerator"]), str(answer["reason"])
    except (ValueError, KeyError, TypeError):
        return fail("accelerator", f"the probe failed: {ended.output}", "mend what it says, then look again")
    if accelerator == "kvm":
        return ok("accelerator", reason)
    return warn("accelerator", reason, "enable virtualisation in the firmware, or accept slow VMs")
