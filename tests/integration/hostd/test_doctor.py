"""`mb host doctor` against what is really there: files, filesystems, servers and certificates, good ones and broken ones."""

import asyncio
import datetime
import email.utils
import fcntl
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fleet.certificates import create_authority, issue_certificate
from fleet.credentials import install
from fleet.identity import Identity, KeyPair, Role
from fleet.revocation import make_list
from hostd.config import HostdConfig
from hostd.doctor.finding import Finding, Level, fail, ok, render, warn
from hostd.doctor.fleet import check_fleet
from hostd.doctor.machine import PROGRAMS, check_machine
from hostd.doctor.storage import check_images, check_storage, filesystem_of
from provisioning.embedded.etcd import LOOPBACK, free_ports, start_etcd
from provisioning.embedded.pki import EMBEDDED_HOST, create_pki, tls_files
from tests.integration.hostd.parts import put_image
from tests.integration.scheduler.parts import Fleet
from tests.integration.scheduler.test_revocation import memory_store, serial_of

pytestmark = pytest.mark.timeout(120)
GIB_KIB = 1024 * 1024
MOUNT = "22 1 0:20 / {where} rw,relatime shared:1 - {kind} none rw\n"


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def levels(findings: Iterable[Finding]) -> dict[str, Level]:
    """By check, the worst of its findings; what is not right always has a next step."""
    found: dict[str, Level] = {}
    for finding in findings:
        assert bool(finding.next_step) is (finding.level is not Level.OK), finding
        found[finding.check] = max(finding.level, found.get(finding.check, Level.OK), key=list(Level).index)
    return found


def test_what_is_shown_fits() -> None:
    """Within 80 columns, with the next step below, a count at the end, and nothing that steers a terminal."""
    lines = render([ok("one", "fine"), warn("two", "word " * 40, "do " * 60), fail("three", "\x1b[31mred\n", "mend")])
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    assert lines[0] == "ok    one           fine"
    assert lines[-1] == "1 ok, 1 warn, 1 fail"


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """What a good machine's kernel says, as files."""
    proc, sys_ = tmp_path / "proc", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (sys_ / "kernel/mm/ksm").mkdir(parents=True)
    (sys_ / "fs/cgroup").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal: {8 * GIB_KIB} kB\nMemAvailable: {4 * GIB_KIB} kB\nHugePages_Total: 0\nHugepagesize: 2048 kB\n"
    )
    (proc / "swaps").write_text("Filename Type Size Used Priority\n/dev/zram0 partition 1 0 100\n")
    (proc / "cgroups").write_text("#subsys_name\thierarchy\tnum_cgroups\tenabled\n")
    (sys_ / "fs/cgroup/cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (sys_ / "kernel/mm/ksm/run").write_text("0\n")
    return proc, sys_


def test_a_good_machine(machine: tuple[Path, Path]) -> None:
    """Swap in compressed memory is none on a disk."""
    found = levels(check_machine(*machine))
    assert {found[name] for name in ("memory", "swap", "hugepages", "ksm", "cgroups")} == {Level.OK}


BROKEN = [
    ("memory", Level.FAIL, "proc/meminfo", "MemTotal: 1048576 kB\nMemAvailable: 1 kB\n"),
    ("swap", Level.WARN, "proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n"),
    (
        "hugepages",
        Level.WARN,
        "proc/meminfo",
        f"MemTotal: {GIB_KIB * 8} kB\nHugePages_Total: 9\nHugepagesize: 2048 kB\n",
    ),
    ("ksm", Level.WARN, "sys/kernel/mm/ksm/run", "1\n"),
    ("cgroups", Level.FAIL, "sys/fs/cgroup/cgroup.controllers", "cpu pids\n"),
]


@pytest.mark.parametrize(("check", "level", "file", "text"), BROKEN)
def test_a_machine_that_lacks_something(
    machine: tuple[Path, Path], tmp_path: Path, check: str, level: Level, file: str, text: str
) -> None:
    """Each is told by its name and weight, with the next step, and nothing else is blamed for it."""
    before = levels(check_machine(*machine))
    (tmp_path / file).write_text(text)
    after = levels(check_machine(*machine))
    assert after[check] is level
    assert {name for name in before if before[name] is not after[name]} == {check}


def test_old_cgroups_do(machine: tuple[Path, Path]) -> None:
    """Version 1 with the controllers that limits need is enough; one that is switched off is not."""
    proc, sys_ = machine
    (sys_ / "fs/cgroup/cgroup.controllers").unlink()
    for enabled, level in ((1, Level.OK), (0, Level.FAIL)):
        (proc / "cgroups").write_text(f"#subsys_name hierarchy num enabled\ncpu 1 1 1\nmemory 2 1 {enabled}\n")
        assert levels(check_machine(proc, sys_))["cgroups"] is level


def test_programs_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With nothing on PATH each package is named, and no check ends in a traceback."""
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = list(check_machine())
    assert levels(findings)["network"] is Level.WARN
    (programs,) = [finding for finding in findings if finding.check == "programs"]
    assert programs.level is Level.FAIL
    assert all(package in programs.next_step for package in PROGRAMS.values())


@pytest.mark.root
def test_this_machine_can_carry_sandboxes() -> None:
    """The kernel that these tests run VMs on has what the doctor asks for; what it made to try is gone."""
    found = levels(check_machine())
    assert {name: found[name] for name in ("user", "programs", "namespaces", "network", "cgroups")} == dict.fromkeys(
        ("user", "programs", "namespaces", "network", "cgroups"), Level.OK
    )
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert "bp-doctor" not in links
    assert (
        "bp_doctor" not in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    )


def config_in(folder: Path, **changes: Any) -> HostdConfig:
    """A configuration with everything below `folder`."""
    tls = tls_files(folder / "pki", Role.HOST, EMBEDDED_HOST)
    listen = f"{LOOPBACK}:{free_ports(1)[0]}"
    made = HostdConfig(EMBEDDED_HOST, (), tls, listen, state_dir=folder / "state", images_dir=folder / "images")
    return replace(made, **changes)


def test_filesystems_are_known() -> None:
    """By what the kernel has mounted where, the last one of a place counting."""
    assert filesystem_of(Path("/proc/self")) == "proc"
    assert filesystem_of(Path("/dev/shm")) == "tmpfs"


@pytest.mark.parametrize(
    ("kind", "level"), [("ext4", Level.OK), ("tmpfs", Level.FAIL), ("nfs4", Level.FAIL), ("overlay", Level.OK)]
)
def test_state_must_last(tmp_path: Path, kind: str, level: Level) -> None:
    """A filesystem that a reboot empties, or that two machines write, is refused; also where the folder is yet to be made."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(
        MOUNT.format(where="/", kind="ext4")
        + MOUNT.format(where=tmp_path, kind="xfs")
        + MOUNT.format(where=tmp_path, kind=kind)
    )
    (state,) = [one for one in check_storage(config_in(tmp_path), tmp_path) if one.check == "state_dir"]
    # The room left is this machine's, and may be less than comfortable.
    assert (state.level is Level.FAIL) is (level is Level.FAIL)
    assert f"on {kind}" in state.found


def test_images_are_read_whole(tmp_path: Path) -> None:
    """None, whole, changed by a byte, and a tag that leads nowhere."""
    images = tmp_path / "images"
    assert levels(check_images(images)) == {"images": Level.FAIL}
    digest = put_image(images)
    (images / "tags").mkdir()
    (images / "tags" / "base:latest").write_text(digest)
    assert levels(check_images(images)) == {"image": Level.OK}
    (images / "tags" / "gone:1").write_text("sha256:" + "0" * 64)
    whole, gone = check_images(images)
    assert (whole.level, gone.level, "gone:1" in gone.found) == (Level.OK, Level.FAIL, True)
    (images / digest.replace(":", "-") / "root.erofs").write_text("ruot")
    broken, _ = check_images(images)
    assert (broken.level, "root.erofs" in broken.found) == (Level.FAIL, True)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with certificates and a state folder."""
    create_pki(tmp_path / "pki")
    (tmp_path / "state").mkdir()
    return tmp_path


def authority_of(site: Path) -> KeyPair:
    return KeyPair((site / "pki" / "ca.crt").read_bytes(), (site / "pki" / "ca.key").read_bytes())


def test_ports(site: Path) -> None:
    """Free, taken by somebody, and taken by the hostd that runs here."""
    config = config_in(site)
    assert levels(check_fleet(config, now()))["port"] is Level.OK
    with socket.socket() as taken:
        taken.bind((LOOPBACK, int(config.listen.rpartition(":")[2])))
        taken.listen()
        assert levels(check_fleet(config, now()))["port"] is Level.FAIL
        with (site / "state" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert levels(check_fleet(config, now()))["port"] is Level.OK
    assert levels(check_fleet(replace(config, listen="nowhere"), now()))["port"] is Level.FAIL


def test_certificates(site: Path) -> None:
    """Good, ending soon, a key that others may read, expired, another host's, another authority's, and none."""
    config = config_in(site)
    assert levels(check_fleet(config, now()))["certificate"] is Level.OK
    assert levels(check_fleet(config, now() + datetime.timedelta(days=340)))["certificate"] is Level.WARN
    config.tls.key.chmod(0o644)
    assert levels(check_fleet(config, now()))["key"] is Level.WARN
    assert levels(check_fleet(config, now() + datetime.timedelta(days=400)))["certificate"] is Level.FAIL
    assert levels(check_fleet(replace(config, host_id="rack1-08"), now()))["certificate"] is Level.FAIL
    install(config.tls, issue_certificate(create_authority(now()), Identity(Role.HOST, EMBEDDED_HOST), now()))
    assert levels(check_fleet(config, now()))["certificate"] is Level.FAIL
    config.tls.key.unlink()
    assert levels(check_fleet(config, now()))["certificate"] is Level.FAIL


@pytest.mark.root
def test_a_real_etcd(site: Path) -> None:
    """Reached with this clock; then one that is away beside it, and one that has withdrawn this certificate."""
    ports = free_ports(2)
    etcd = start_etcd(site / "etcd", site / "pki", *ports)
    config = config_in(site, etcd=(f"{LOOPBACK}:{ports[0]}",))
    try:
        found = levels(check_fleet(config, now()))
        assert (found["etcd"], found["clock"], found["scheduler"]) == (Level.OK, Level.OK, Level.WARN)
        away = replace(config, etcd=(f"{LOOPBACK}:{free_ports(1)[0]}", *config.etcd))
        found = levels(check_fleet(away, now()))
        assert (found["etcd"], found["clock"]) == (Level.FAIL, Level.OK)
        withdrawn = make_list(authority_of(site), {serial_of(config.tls): now()}, now())
        (site / "pki" / "ca.crl").write_bytes(withdrawn)
        (refused,) = [one for one in check_fleet(config, now()) if one.check == "etcd"]
        assert (refused.level, "does not take the certificate" in refused.found) == (Level.FAIL, True)
    finally:
        etcd.stop()


async def test_a_real_scheduler(site: Path) -> None:
    """Reached with the host's certificate; one that is away, and one of another fleet, say which they are."""
    async with memory_store() as store, Fleet(store, site / "pki").running() as fleet:
        await fleet.answers()
        config = config_in(site, schedulers=(fleet.address,))

        def found_of(config: HostdConfig) -> Finding:
            return next(one for one in check_fleet(config, now()) if one.check == "scheduler")

        assert (await asyncio.to_thread(found_of, config)).level is Level.OK
        away = replace(config, schedulers=(f"{LOOPBACK}:1",))
        found = await asyncio.to_thread(found_of, away)
        assert (found.level, "Connection refused" in found.found) == (Level.FAIL, True)
        create_pki(site / "other" / "pki")
        other = replace(config, tls=config_in(site / "other").tls)
        found = await asyncio.to_thread(found_of, other)
        assert (found.level, "not of this fleet" in found.found) == (Level.FAIL, True)


@contextmanager
def telling_time(site: Path, moment: datetime.datetime) -> Iterator[str]:
    """A server with etcd's certificate whose clock is elsewhere; its address."""
    files = tls_files(site / "pki", Role.STORE, "etcd")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(files.certificate, files.key)
    answer = f"HTTP/1.1 200 OK\r\nDate: {email.utils.format_datetime(moment, usegmt=True)}\r\n\r\n".encode()

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(connection, server_side=True) as wrapped:
                    wrapped.recv(4096)
                    wrapped.sendall(answer)
            except OSError:
                connection.close()

    with socket.create_server((LOOPBACK, 0)) as listening:
        server = Thread(target=serve)
        server.start()
        yield f"{LOOPBACK}:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        server.join()


@pytest.mark.parametrize(
    ("minutes", "level"), [(0, Level.OK), (1, Level.WARN), (-1, Level.WARN), (10, Level.FAIL), (-60, Level.FAIL)]
)
def test_clocks_that_differ(site: Path, minutes: int, level: Level) -> None:
    """By seconds is told, by so much that certificates would fail is a failure, in either direction."""
    with telling_time(site, now() + datetime.timedelta(minutes=minutes)) as address:
        (clock,) = [one for one in check_fleet(config_in(site, etcd=(address,)), now()) if one.check == "clock"]
    assert clock.level is level
    assert minutes == 0 or ("behind" if minutes > 0 else "ahead of") in clock.found


def test_the_command_without_a_configuration(tmp_path: Path) -> None:
    """`mb host doctor` is hostd's own: its exit code, its JSON, and no traceback when there is nothing to read."""
    arguments = [sys.executable, "-m", "mb", "host", "doctor", "--config", str(tmp_path / "gone.toml"), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    first = json.loads(done.stdout)[0]
    assert (first["check"], first["level"], "gone.toml" in first["found"]) == ("configuration", "fail", True)
    assert done.stderr == ""
