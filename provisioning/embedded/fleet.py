"""A whole Bedplate on one machine: etcd, a libvirt of its own, a scheduler and a hostd, with every file in one folder.

    <folder>/pki etcd libvirt          what the programs stand on
    <folder>/scheduler.toml hostd.toml tenant.toml operator.toml
    <folder>/state run log             hostd's folders

To be run in private mount, network and process namespaces (`./dev private`): it makes a bridge, and nothing may outlive it.
"""

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from bedplate.host.v1 import host_pb2, service_pb2, service_pb2_grpc
from fleet.errors import HostFaultError
from fleet.identity import SCHEDULER_SERVER_NAME, Role, TlsFiles
from fleet.rpc import channel_credentials, channel_options
from provisioning.embedded.etcd import LOOPBACK, free_ports, start_etcd
from provisioning.embedded.libvirt import QEMU_ID, Libvirt, start_libvirt
from provisioning.embedded.pki import EMBEDDED_HOST, EMBEDDED_TENANT, create_pki, tls_files
from provisioning.embedded.process import Program, start_program

CALL_TIMEOUT_S = 2.0
COMMAND_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What an embedded fleet promises and where it looks for images; 0 takes what the machine has."""

    images_dir: Path
    vcpus: int = 0
    memory_mib: int = 0


@dataclass(slots=True)
class EmbeddedFleet:
    """The running programs; `hostd` and `scheduler` are replaced when they are started again."""

    folder: Path
    endpoint: str
    peer_port: int
    address: str
    etcd: Program
    libvirt: Libvirt
    scheduler: Program
    hostd: Program

    @property
    def tenant_config(self) -> Path:
        """`mb`'s configuration as a tenant."""
        return self.folder / "tenant.toml"

    @property
    def operator_config(self) -> Path:
        """`mb`'s configuration as an operator."""
        return self.folder / "operator.toml"

    @property
    def enrolment_address(self) -> str:
        """Where a new host asks for its certificate."""
        return str(tomllib.loads((self.folder / "scheduler.toml").read_text())["enrolment"]["listen"])

    def start_etcd(self) -> None:
        """Starts etcd (again) on the data it had and returns when it serves."""
        self.etcd = _start_etcd(self.folder, self.endpoint, self.peer_port)

    def start_hostd(self) -> None:
        """Starts hostd (again) and returns when the scheduler calls the host alive."""
        self.hostd = _start_hostd(self.folder, self.address)

    def start_scheduler(self) -> None:
        """Starts the scheduler (again) and returns when it answers."""
        self.scheduler = _start_scheduler(self.folder, self.address)

    def stop_control_plane(self) -> None:
        """Ends hostd and scheduler; each gives its lease back."""
        self.hostd.stop()
        self.scheduler.stop()

    def stop(self) -> None:
        """Ends everything that still runs; without VMs the host's network goes too."""
        self.stop_control_plane()
        self._end_guard()
        run_hostd(self.folder, "retire", check=False)
        self.libvirt.stop()
        self.etcd.stop()

    def _end_guard(self) -> None:
        """Ends what would kill VMs that nobody keeps any more: it outlives hostd on purpose."""
        with suppress(OSError, ValueError):
            os.kill(int((self.folder / "run" / "guard" / "lock").read_text()), signal.SIGKILL)


def start_fleet(folder: Path, settings: FleetSettings, progress: Callable[[str], None]) -> EmbeddedFleet:
    """Starts everything below the empty `folder` and returns when the host is alive.

    Raises HostFaultError `program_failed`; what was started by then is ended.
    """
    # QEMU's unprivileged user passes through to the files that are its own.
    folder.chmod(0o711)
    create_pki(folder / "pki")
    etcd_port, peer_port, scheduler_port, hostd_port, joining_port = free_ports(5)
    endpoint, address = f"{LOOPBACK}:{etcd_port}", f"{LOOPBACK}:{scheduler_port}"
    _write_configs(folder, endpoint, address, (hostd_port, joining_port), settings)
    with ExitStack() as undo:
        etcd = _start_etcd(folder, endpoint, peer_port)
        undo.callback(etcd.stop)
        progress("etcd, with client certificates")
        accelerator, reason = _probe_accelerator(folder)
        progress(f"accelerator {accelerator}: {reason}")
        (folder / "libvirt").mkdir()
        libvirt = start_libvirt(folder / "libvirt", has_kvm=accelerator == "kvm")
        undo.callback(libvirt.stop)
        progress("libvirt of its own")
        scheduler = _start_scheduler(folder, address)
        undo.callback(scheduler.stop)
        progress("scheduler")
        hostd = _start_hostd(folder, address)
        progress("hostd: the host is alive")
        # All of it runs: from here on it is the fleet's.
        undo.pop_all()
    return EmbeddedFleet(folder, endpoint, peer_port, address, etcd, libvirt, scheduler, hostd)


def _probe_accelerator(folder: Path) -> tuple[str, str]:
    """hostd's own probe: libvirt must not see a /dev/kvm on which no guest runs."""
    found = json.loads(run_hostd(folder, "probe"))
    return found["accelerator"], found["reason"]


def run_hostd(folder: Path, command: str, *, check: bool = True) -> str:
    """What one of hostd's short commands prints; raises HostFaultError `hostd_failed` when it fails and `check` is set."""
    arguments = [sys.executable, "-m", "hostd", "--config", str(folder / "hostd.toml"), command]
    done = subprocess.run(
        arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if check and done.returncode != 0:
        raise HostFaultError("hostd_failed", f"hostd {command}: {done.stderr.strip()}", "mend what it says")
    return done.stdout


def _start_etcd(folder: Path, endpoint: str, peer_port: int) -> Program:
    return start_etcd(folder / "etcd", folder / "pki", int(endpoint.rsplit(":", 1)[1]), peer_port)


def _start_scheduler(folder: Path, address: str) -> Program:
    arguments = [sys.executable, "-m", "scheduler", "--config", str(folder / "scheduler.toml")]
    is_ready = _Hosts(folder, address).answers
    return start_program("scheduler", arguments, folder / "scheduler.log", is_ready)


def _start_hostd(folder: Path, address: str) -> Program:
    arguments = [sys.executable, "-m", "hostd", "--config", str(folder / "hostd.toml")]
    return start_program("hostd", arguments, folder / "hostd.log", _Hosts(folder, address).has_new_host)


class _Hosts:
    """Asks a scheduler for its hosts."""

    def __init__(self, folder: Path, address: str) -> None:
        self._tls = tls_files(folder / "pki", Role.OPERATOR, "operator")
        self._address = address
        self._registered_before = {host.record.registered_at_ms for host in self._list() or ()}

    def answers(self) -> bool:
        """Whether the scheduler serves."""
        return self._list() is not None

    def has_new_host(self) -> bool:
        """Whether a host is alive that has registered since this was made: an earlier hostd's lease may still live."""
        hosts = self._list() or ()
        return any(host.is_alive and host.record.registered_at_ms not in self._registered_before for host in hosts)

    def _list(self) -> list[host_pb2.Host] | None:
        options = channel_options(SCHEDULER_SERVER_NAME)
        with grpc.secure_channel(self._address, channel_credentials(self._tls), options=options) as channel:
            stub = service_pb2_grpc.HostServiceStub(channel)
            try:
                return list(stub.ListHosts(service_pb2.ListHostsRequest(), timeout=CALL_TIMEOUT_S).hosts)
            except grpc.RpcError:
                return None


def _write_configs(folder: Path, endpoint: str, address: str, ports: tuple[int, int], settings: FleetSettings) -> None:
    pki, (hostd_port, joining_port) = folder / "pki", ports
    store = f'etcd = ["{endpoint}"]\n'
    capacity = f"\n[inventory.capacity]\nvcpus = {settings.vcpus}\nmemory_mib = {settings.memory_mib}\n"
    hostd = [
        f'host_id = "{EMBEDDED_HOST}"\nlisten = "{LOOPBACK}:{hostd_port}"\n{store}qemu_user = "{QEMU_ID}"\n',
        f'images_dir = "{settings.images_dir}"\nstate_dir = "{folder}/state"\n',
        f'run_dir = "{folder}/run"\nlog_dir = "{folder}/log"\nschedulers = ["{address}"]\n',
        _tls_table(tls_files(pki, Role.HOST, EMBEDDED_HOST)) + capacity,
    ]
    scheduler = f'listen = "{address}"\n{store}' + _tls_table(tls_files(pki, Role.SCHEDULER, "scheduler"))
    scheduler += f'\n[enrolment]\nlisten = "{LOOPBACK}:{joining_port}"\nca_key = "{pki}/ca.key"\n'
    client = f'scheduler = "{address}"\n'
    operator = f'tenant = "{EMBEDDED_TENANT}"\n' + _tls_table(tls_files(pki, Role.OPERATOR, "operator"))
    (folder / "hostd.toml").write_text("".join(hostd))
    (folder / "scheduler.toml").write_text(scheduler)
    (folder / "tenant.toml").write_text(client + _tls_table(tls_files(pki, Role.TENANT, EMBEDDED_TENANT)))
    (folder / "operator.toml").write_text(client + operator)


def _tls_table(files: TlsFiles) -> str:
    return f'\n[tls]\nca = "{files.ca}"\ncertificate = "{files.certificate}"\nkey = "{files.key}"\n'
