"""hostd's composition root: reads the configuration, chooses the drivers, runs the daemon until it is told to stop.

`python -m hostd --config FILE` serves; after it `probe` only says what VMs would run on, `doctor` checks all that hostd needs, and
`retire` takes the bridge and the packet filter's rules away from a machine that is no host any more.
"""

import argparse
import asyncio
import datetime
import fcntl
import json
import os
import resource
import signal
import sys
from pathlib import Path

from fleet.certificates import check_files
from fleet.config import load_config
from fleet.credentials import finish_install
from fleet.errors import BedplateError, ConflictError, UnavailableError
from fleet.identity import Identity, Role
from fleet.model.ids import HostId
from fleet.store.etcd import open_etcd
from fleet.telemetry import configure_logging
from hostd.config import HostdConfig
from hostd.daemon import SCRATCH_DIR, Parts, run_daemon
from hostd.doctor import __main__ as doctor
from hostd.drivers.domain_xml import QemuUser
from hostd.drivers.guardian import GuardProcess
from hostd.drivers.guest import SocketLinks
from hostd.drivers.hypervisor import AcceleratorProbe, LibvirtHypervisor
from hostd.drivers.image import ImageStore, ScratchDisks, SourceStore
from hostd.drivers.network import LinuxNetwork, NetworkSettings
from hostd.orders import Orders
from hostd.reconcile.apply import Drivers
from hostd.reconcile.state import BootFiles
from hostd.room import Room
from hostd.sourcing import Sourcing

_EPILOG = """examples:
  python -m hostd --config /etc/bedplate/hostd.toml
  python -m hostd --config /etc/bedplate/hostd.toml probe     {"accelerator": "kvm", "reason": "…"}
  python -m hostd --config /etc/bedplate/hostd.toml retire    refused while a VM of ours is there
"""


def main() -> int:
    """Runs one command; 0 when it ended as asked, 1 for an error that it has printed."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("hostd", description=__doc__, epilog=_EPILOG, formatter_class=formatter)
    parser.add_argument("--config", type=Path, default=Path("/etc/bedplate/hostd.toml"), help="TOML (%(default)s)")
    parser.add_argument("command", nargs="?", choices=[*_COMMANDS, "doctor"], default="serve", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="with doctor: a list of findings as JSON")
    options = parser.parse_args()
    if options.command == "doctor":
        return doctor.report(options.config, as_json=options.json)
    try:
        config = load_config(HostdConfig, options.config)
        config.check()
        configure_logging("hostd", config.log_level)
        for folder in (config.state_dir, config.run_dir, config.log_dir):
            _ensure_folder(folder)
        asyncio.run(_COMMANDS[options.command](config))
    except BedplateError as error:
        print(f"error: {error.message}\n  next: {error.next_step}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


async def _serve(config: HostdConfig) -> None:
    # Values of secrets pass through this memory: no crash may write it to a disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    finish_install(config.tls)
    check_files(config.tls, Identity(Role.HOST, config.host_id), datetime.datetime.now(datetime.UTC))
    lock = _hold_state(config.state_dir)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    user = config.find_qemu_user()
    store = open_etcd(config.etcd, config.tls)
    images, sources = ImageStore(config.images_dir), SourceStore(config.state_dir / "sources")
    hypervisor, links = LibvirtHypervisor(config.libvirt_uri, user, _probe(config, images)), SocketLinks()
    accelerator, reason = await hypervisor.probe_accelerator()
    orders = Orders(config.state_dir, config.host_id)
    room = Room(HostId(config.host_id), store, sources, config.sources, named=orders.named_sources)
    guard = GuardProcess(config.run_dir, config.state_dir)
    sourcing = Sourcing(HostId(config.host_id), store, sources, config.tls, room)
    drivers = Drivers(
        hypervisor=hypervisor,
        network=_network(config, user),
        disks=ScratchDisks(config.state_dir / SCRATCH_DIR, (user.uid, user.gid)),
        images=images,
        sources=sourcing,
    )
    try:
        await run_daemon(
            Parts(config, store, orders, drivers, links, guard, images, sources, sourcing, room, accelerator, reason),
            stop,
        )
    finally:
        await links.close()
        await hypervisor.close()
        await store.close()
        os.close(lock)


async def _print_probe(config: HostdConfig) -> None:
    accelerator, reason = await _probe(config, ImageStore(config.images_dir)).run()
    print(json.dumps({"accelerator": accelerator, "reason": reason}))  # noqa: T201


async def _retire(config: HostdConfig) -> None:
    lock = _hold_state(config.state_dir)
    user = config.find_qemu_user()
    hypervisor = LibvirtHypervisor(config.libvirt_uri, user, _probe(config, ImageStore(config.images_dir)))
    try:
        domains = await hypervisor.list_domains()
        if domains:
            message = f"this host still has {len(domains)} VM(s): {', '.join(sorted(domains))}"
            raise ConflictError("host_busy", message, "destroy their sandboxes first: mb ls, mb destroy NAME")
        await _network(config, user).remove_bridge()
    finally:
        await hypervisor.close()
        os.close(lock)


def _network(config: HostdConfig, user: QemuUser) -> LinuxNetwork:
    interface = config.network.interface()
    return LinuxNetwork(NetworkSettings(config.network.bridge, interface, user.uid, user.gid))


def _probe(config: HostdConfig, images: ImageStore) -> AcceleratorProbe:
    async def find_boot() -> BootFiles | None:
        found = await images.list_images()
        return await images.ensure_image(found[0].digest) if found else None

    return AcceleratorProbe(config.find_qemu_user(), config.state_dir / "accelerator.json", find_boot)


def _ensure_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # QEMU's unprivileged user passes through to the files that are its own.
        folder.chmod(0o711)
    except OSError as error:
        next_step = "run hostd as root, or name another folder in the configuration"
        raise UnavailableError("folder_unusable", f"{folder}: {error.strerror}", next_step) from error


def _hold_state(state_dir: Path) -> int:
    """Holds the state folder against a second hostd; the kernel lets go when this process ends."""
    handle = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"another hostd uses {state_dir}"
        raise UnavailableError("state_in_use", message, "stop it first, or name another state_dir") from error
    return handle


_COMMANDS = {"serve": _serve, "probe": _print_probe, "retire": _retire}

if __name__ == "__main__":
    sys.exit(main())
