"""A whole Bedplate on a rack of machines (provisioning.embedded.machines): members of etcd, schedulers and hosts, each on its own.

    <folder>/pki <machine>/...         certificates; configuration, state and log of each machine's program

Programs are started, stopped, paused and killed one by one; nothing here waits for a cluster that cannot be well.
"""

import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from bedplate.host.v1 import host_pb2, service_pb2, service_pb2_grpc
from fleet.errors import HostFaultError
from fleet.identity import SCHEDULER_SERVER_NAME, Identity, KeyPair, Role, TlsFiles
from fleet.rpc import channel_credentials, channel_options
from provisioning.embedded.etcd import QUOTA_BYTES, EtcdMember, is_serving, start_member
from provisioning.embedded.libvirt import QEMU_ID, Libvirt, start_libvirt
from provisioning.embedded.machines import Machine, Rack
from provisioning.embedded.pki import EMBEDDED_TENANT, add_certificate, create_pki, tls_files
from provisioning.embedded.process import Program, start_program

ETCD_PORT, PEER_PORT, SCHEDULER_PORT, HOSTD_PORT = 2379, 2380, 7443, 7611
CALL_TIMEOUT_S = 3.0
COMMAND_TIMEOUT_S = 120.0
# A whole rack on two busy cores; only one that does not come up waits as long.
WELL_TIMEOUT_S = 120.0
LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class HostPlan:
    """A host: its name, what it promises, and the module that is its hostd; `has_libvirt` gives it a libvirt of its own."""

    name: str
    vcpus: int
    memory_mib: int
    module: str = "hostd"
    has_libvirt: bool = True
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class RackPlan:
    """What stands in the rack."""

    images_dir: Path
    hosts: tuple[HostPlan, ...]
    etcds: int = 3
    schedulers: int = 3
    quota_bytes: int = QUOTA_BYTES


class Unit:
    """A program on its machine, which may be down."""

    def __init__(self, machine: Machine, launch: Callable[[], Program]) -> None:
        self.machine = machine
        self._launch = launch
        self._program: Program | None = None
        self.is_paused = False

    @property
    def name(self) -> str:
        """The machine's."""
        return self.machine.name

    @property
    def is_up(self) -> bool:
        """Whether it runs, and is not paused."""
        return self._program is not None and self._program.process.poll() is None and not self.is_paused

    @property
    def program(self) -> Program:
        """The program, once it was started."""
        assert self._program is not None
        return self._program

    def start(self) -> None:
        """Starts it unless it runs; it need not be ready."""
        if self._program is None or self._program.process.poll() is not None:
            self._program = self._launch()

    def kill(self) -> None:
        """Ends it as a crash would."""
        self.program.kill()
        self.is_paused = False

    def pause(self) -> None:
        """Stops it in the middle of whatever it does (SIGSTOP)."""
        self.program.signal(signal.SIGSTOP)
        self.is_paused = True

    def resume(self) -> None:
        """Lets it go on."""
        if self.is_paused:
            self.program.signal(signal.SIGCONT)
            self.is_paused = False

    def stop(self) -> None:
        """Asks it to end, and sees to it."""
        if self._program is not None:
            self.resume()
            self._program.stop()


class RackFleet:
    """The rack, its programs by machine's name, and how to reach them."""

    def __init__(self, folder: Path, plan: RackPlan) -> None:
        """Makes machines, certificates and configurations below the empty `folder`; starts nothing."""
        # QEMU's unprivileged user passes through to the files that are its own.
        folder.chmod(0o711)
        self.folder, self.plan, self.rack = folder, plan, Rack()
        self.pki = folder / "pki"
        create_pki(self.pki)
        self._authority = KeyPair((self.pki / "ca.crt").read_bytes(), (self.pki / "ca.key").read_bytes())
        self.members: list[EtcdMember] = []
        self.etcds = {unit.name: unit for unit in map(self._make_etcd, range(plan.etcds))}
        schedulers = [self._add_machine(f"sched-{number + 1}", Role.SCHEDULER) for number in range(plan.schedulers)]
        self.scheduler_addresses = {one.name: f"{one.address}:{SCHEDULER_PORT}" for one in schedulers}
        self.schedulers = {one.name: self._make_scheduler(one) for one in schedulers}
        self.libvirts: dict[str, Libvirt] = {}
        self.hosts = {one.name: self._make_host(one) for one in plan.hosts}

    @property
    def endpoints(self) -> list[str]:
        """Every member of etcd."""
        return [member.client for member in self.members]

    def tls(self, role: Role, name: str) -> TlsFiles:
        """The certificate of a role and name."""
        return tls_files(self.pki, role, name)

    def units(self) -> list[Unit]:
        """Every program."""
        return [*self.etcds.values(), *self.schedulers.values(), *self.hosts.values()]

    def start(self, progress: Callable[[str], None]) -> None:
        """Starts everything and returns when all is well; raises HostFaultError `rack_unwell` or `program_failed`."""
        for unit in self.etcds.values():
            unit.start()
        _wait(lambda: not self.unserved_members(), lambda: f"etcd does not serve: {self.unserved_members()}")
        progress("etcd's members serve each other")
        accelerator = self._probe_accelerator()
        for plan in self.plan.hosts:
            self._prepare_host(plan, accelerator)
        progress("libvirt on each host that has one")
        for unit in (*self.schedulers.values(), *self.hosts.values()):
            unit.start()
        self.wait_well()
        progress("schedulers serve, hosts are alive")

    def start_what_is_down(self) -> None:
        """Every program that has ended runs again."""
        for unit in self.units():
            unit.start()

    def wait_well(self) -> None:
        """Returns when every scheduler serves and sees every host alive; raises HostFaultError `rack_unwell`."""
        _wait(lambda: not self.unwell(), lambda: "; ".join(self.unwell()))

    def unwell(self) -> list[str]:
        """What is not as it should be."""
        found = [f"{unit.name} is down" for unit in self.units() if not unit.is_up]
        for name, address in self.scheduler_addresses.items():
            hosts = self.list_hosts(address) or []
            alive = {host.record.host_id for host in hosts if host.is_alive}
            found += [f"{name} does not see {host}" for host in self.hosts if host not in alive]
        return found

    def unserved_members(self) -> list[str]:
        """The members of etcd that complete no handshake."""
        return [
            one.name for one in self.members if not is_serving(one.client, tls_files(self.pki, Role.STORE, one.name))
        ]

    def list_hosts(self, address: str) -> list[host_pb2.Host] | None:
        """What the scheduler at `address` says of hosts; None when it does not answer."""
        credentials = channel_credentials(self.tls(Role.OPERATOR, "operator"))
        with grpc.secure_channel(address, credentials, options=channel_options(SCHEDULER_SERVER_NAME)) as channel:
            stub = service_pb2_grpc.HostServiceStub(channel)
            with suppress(grpc.RpcError):
                return list(stub.ListHosts(service_pb2.ListHostsRequest(), timeout=CALL_TIMEOUT_S).hosts)
        return None

    def client_config(self, role: Role, name: str) -> Path:
        """`mb`'s configuration for that certificate, with every scheduler."""
        path = self.folder / f"{role}-{name}.toml"
        addresses = ", ".join(f'"{address}"' for address in self.scheduler_addresses.values())
        tenant = f'tenant = "{EMBEDDED_TENANT}"\n' if role is Role.OPERATOR else ""
        path.write_text(f"schedulers = [{addresses}]\n{tenant}" + _tls_table(self.tls(role, name)))
        return path

    def stop(self) -> None:
        """Ends everything that runs, and takes the rack away; VMs must have ended."""
        self.rack.heal()
        for unit in (*self.hosts.values(), *self.schedulers.values()):
            unit.stop()
        self._end_guards()
        for name, libvirt in self.libvirts.items():
            _run_hostd(self.hosts[name].machine, self.folder / name, "retire")
            libvirt.stop()
        for unit in self.etcds.values():
            unit.stop()
        self.rack.stop()

    def _end_guards(self) -> None:
        """Ends what would kill VMs that nobody keeps any more: guards outlive hostd on purpose."""
        for name in self.hosts:
            with suppress(OSError, ValueError):
                os.kill(int((self.folder / name / "run" / "guard" / "lock").read_text()), signal.SIGKILL)

    def _add_machine(self, name: str, role: Role) -> Machine:
        machine = self.rack.add(name)
        (self.folder / name).mkdir()
        (self.folder / name).chmod(0o711)
        now = datetime.datetime.now(datetime.UTC)
        add_certificate(self.pki, self._authority, Identity(role, name), now, machine.address)
        return machine

    def _make_etcd(self, number: int) -> Unit:
        machine = self._add_machine(f"etcd-{number + 1}", Role.STORE)
        client, peer = f"{machine.address}:{ETCD_PORT}", f"{machine.address}:{PEER_PORT}"
        member = EtcdMember(machine.name, client, peer, machine.within(), self.plan.quota_bytes)
        self.members.append(member)
        return Unit(machine, lambda: start_member(self.folder / machine.name, self.pki, member, self.members))

    def _make_scheduler(self, machine: Machine) -> Unit:
        config = self.folder / machine.name / "scheduler.toml"
        text = f'name = "{machine.name}"\nlisten = "{machine.address}:{SCHEDULER_PORT}"\n{self._store_line()}'
        config.write_text(text + _tls_table(self.tls(Role.SCHEDULER, machine.name)))
        return Unit(machine, lambda: _launch(machine, config, "scheduler"))

    def _make_host(self, plan: HostPlan) -> Unit:
        machine = self._add_machine(plan.name, Role.HOST)
        folder = self.folder / plan.name
        addresses = ", ".join(f'"{address}"' for address in self.scheduler_addresses.values())
        text = f'host_id = "{plan.name}"\nlisten = "{machine.address}:{HOSTD_PORT}"\nschedulers = [{addresses}]\n'
        text += f'{self._store_line()}qemu_user = "{QEMU_ID}"\nimages_dir = "{self.plan.images_dir}"\n'
        text += f'state_dir = "{folder}/state"\nrun_dir = "{folder}/run"\nlog_dir = "{folder}/log"\n'
        text += _tls_table(self.tls(Role.HOST, plan.name))
        text += f"\n[inventory.capacity]\nvcpus = {plan.vcpus}\nmemory_mib = {plan.memory_mib}\n"
        text += "\n[inventory.labels]\n" + "".join(f'{name} = "{value}"\n' for name, value in plan.labels)
        config = folder / "hostd.toml"
        config.write_text(text)
        return Unit(machine, lambda: _launch(machine, config, plan.module))

    def _store_line(self) -> str:
        return "etcd = [" + ", ".join(f'"{endpoint}"' for endpoint in self.endpoints) + "]\n"

    def _probe_accelerator(self) -> Path | None:
        """The answer of hostd's probe, which is the same on every machine of this one's; None when no host runs VMs."""
        first = next((plan.name for plan in self.plan.hosts if plan.has_libvirt), None)
        if first is None:
            return None
        _run_hostd(self.hosts[first].machine, self.folder / first, "probe")
        return self.folder / first / "state" / "accelerator.json"

    def _prepare_host(self, plan: HostPlan, accelerator: Path | None) -> None:
        if not plan.has_libvirt:
            return
        folder, machine = self.folder / plan.name, self.hosts[plan.name].machine
        (folder / "state").mkdir(exist_ok=True)
        has_kvm = False
        if accelerator is not None and accelerator.exists():
            has_kvm = '"kvm"' in accelerator.read_text()
            if accelerator.parent != folder / "state":
                shutil.copy(accelerator, folder / "state")
        (folder / "libvirt").mkdir()
        self.libvirts[plan.name] = start_libvirt(folder / "libvirt", has_kvm=has_kvm, within=machine.within())


def _launch(machine: Machine, config: Path, module: str) -> Program:
    arguments = [*machine.within(), sys.executable, "-m", module, "--config", str(config)]
    return start_program(machine.name, arguments, config.with_suffix(".log"), lambda: True)


def _run_hostd(machine: Machine, folder: Path, command: str) -> None:
    arguments = [*machine.within(), sys.executable, "-m", "hostd", "--config", str(folder / "hostd.toml"), command]
    done = subprocess.run(
        arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        message = f"hostd {command} on {machine.name}: {done.stderr.strip()}"
        raise HostFaultError("hostd_failed", message, "mend what it says")


def _wait(is_so: Callable[[], bool], describe: Callable[[], str]) -> None:
    deadline = time.monotonic() + WELL_TIMEOUT_S
    while not is_so():
        if time.monotonic() > deadline:
            raise HostFaultError("rack_unwell", f"after {WELL_TIMEOUT_S:.0f} s: {describe()}", "see the programs' logs")
        time.sleep(LOOK_S)


def _tls_table(files: TlsFiles) -> str:
    return f'\n[tls]\nca = "{files.ca}"\ncertificate = "{files.certificate}"\nkey = "{files.key}"\n'
