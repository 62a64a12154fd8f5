"""A libvirt of its own for an embedded host: virtlogd and libvirtd, in private mount namespaces, with their state in one folder."""

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from provisioning.embedded.process import Program, start_program

CGROUPS = Path("/sys/fs/cgroup")
SCRIPT = Path(__file__).parent / "libvirt.sh"
# Below a /run that the caller has made private.
LIBVIRT_URI = "qemu:///system"
LIBVIRT_SOCKET = Path("/run/libvirt/libvirt-sock")
VIRTLOGD_SOCKET = Path("/run/libvirt/virtlogd-sock")
# No AppArmor profile is loaded for a libvirt that is not the machine's own; QEMU still runs unprivileged with seccomp on.
# The number of a user that no package has: nothing else on the machine belongs to it.
QEMU_ID = 64123
QEMU_CONF = f"""security_driver = "none"
user = "+{QEMU_ID}"
group = "+{QEMU_ID}"
stdio_handler = "logd"
seccomp_sandbox = 1
remember_owner = 0
"""
LIBVIRTD_CONF = """listen_tls = 0
listen_tcp = 0
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
log_level = 3
"""
# One console holds the boot and what agents print to it by force; two files of a MiB are enough to see why a guest died.
VIRTLOGD_CONF = """max_size = 1048576
max_backups = 1
"""


@dataclass(slots=True)
class Libvirt:
    """The two running daemons; `daemon` is replaced when it is started again."""

    folder: Path
    has_kvm: bool
    within: tuple[str, ...]
    log: Program
    daemon: Program

    def restart_daemon(self) -> None:
        """Ends libvirtd and starts it again, as an update would; domains run on."""
        self.daemon.stop()
        self.daemon = _start_daemon(self.folder, self.within, has_kvm=self.has_kvm)

    def stop(self) -> None:
        """Ends both, and removes the cgroups that libvirt keeps for VMs if they are empty; domains that still run go on."""
        self.daemon.stop()
        self.log.stop()
        for path in CGROUPS.glob("*/machine"):
            with suppress(OSError):
                path.rmdir()


def start_libvirt(folder: Path, *, has_kvm: bool, within: tuple[str, ...] = ()) -> Libvirt:
    """Starts both daemons and returns when they serve; needs root and a private /run. `has_kvm`: a probe guest has run on it.

    `within` is put before each command line: it names the machine to run on, where that is not this one.
    """
    conf = folder / "etc" / "libvirt"
    conf.mkdir(parents=True)
    (conf / "qemu.conf").write_text(QEMU_CONF)
    (conf / "libvirtd.conf").write_text(LIBVIRTD_CONF)
    (conf / "virtlogd.conf").write_text(VIRTLOGD_CONF)
    log = _start(folder, "virtlogd", within, lambda: _exists(VIRTLOGD_SOCKET, within), has_kvm=has_kvm)
    return Libvirt(folder, has_kvm, within, log, _start_daemon(folder, within, has_kvm=has_kvm))


def _start_daemon(folder: Path, within: tuple[str, ...], *, has_kvm: bool) -> Program:
    return _start(folder, "libvirtd", within, lambda: _is_serving(within), has_kvm=has_kvm)


def _start(folder: Path, name: str, within: tuple[str, ...], is_ready: Callable[[], bool], *, has_kvm: bool) -> Program:
    # unshare and the script exec: the process is the daemon itself.
    arguments = [*within, "unshare", "--mount", str(SCRIPT), str(folder), str(QEMU_ID)]
    arguments += ["show-kvm" if has_kvm else "hide-kvm", name]
    env = {"PATH": f"/usr/sbin:/sbin:{os.environ['PATH']}"}
    return start_program(name, arguments, folder / f"{name}.log", is_ready, env)


def _exists(path: Path, within: tuple[str, ...]) -> bool:
    return subprocess.run([*within, "test", "-e", str(path)], stdin=subprocess.DEVNULL, check=False).returncode == 0


def _is_serving(within: tuple[str, ...]) -> bool:
    # The socket listens before the drivers are ready; a call is answered only afterwards.
    if not _exists(LIBVIRT_SOCKET, within):
        return False
    probe = [*within, "virsh", "--connect", LIBVIRT_URI, "list"]
    return subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
