"""`python -m scheduler` as an operator runs it: starts, serves, takes over, and ends when it is asked to."""

import asyncio
import datetime
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bedplate.sandbox.v1 import service_pb2
from fleet.certificates import create_authority
from fleet.codec import to_message
from fleet.identity import Identity, KeyPair, Role
from fleet.store.memory import MemoryStore
from provisioning.embedded.etcd import LOOPBACK, free_ports
from provisioning.embedded.pki import add_certificate, create_pki, tls_files
from tests.integration.scheduler.parts import HANG_S, Fleet, ObedientHost
from tests.unit.scheduler.build import sandbox_id, spec


def write_config(folder: Path, pki: Path, fleet: Fleet, etcd: str, extra: str = "") -> Path:
    """A scheduler's configuration file."""
    files = tls_files(pki, Role.SCHEDULER, "scheduler")
    path = folder / "scheduler.toml"
    path.write_text(
        f'listen = "{fleet.address}"\netcd = ["{etcd}"]\n{extra}\n'
        f'[tls]\nca = "{files.ca}"\ncertificate = "{files.certificate}"\nkey = "{files.key}"\n'
    )
    return path


@asynccontextmanager
async def program(config: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The program with that configuration; killed if a test leaves it running."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scheduler", "--config", str(config), stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def end(process: asyncio.subprocess.Process) -> tuple[int, str]:
    """Asks it to end; its exit code and what it wrote."""
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(HANG_S):
        _, log = await process.communicate()
    assert process.returncode is not None
    return process.returncode, log.decode()


@pytest.mark.root
async def test_it_serves_and_ends_on_sigterm(pki: Path, etcd_endpoint: str, tmp_path: Path) -> None:
    """With its store there it answers, also while a watch is open it ends with 0, and its log tells where it listened."""
    fleet = Fleet(MemoryStore(lambda: 0.0), pki)
    async with program(write_config(tmp_path, pki, fleet, etcd_endpoint)) as process:
        await fleet.answers()
        client = fleet.client(Role.TENANT, "demo")
        request = service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id(77), spec=to_message(spec(77)))
        await client.sandboxes.CreateSandbox(request)
        watch = client.sandboxes.WatchSandbox(service_pb2.GetSandboxRequest(sandbox="box-77"))
        await anext(aiter(watch))
        code, log = await end(process)
        watch.cancel()
    await fleet.close()
    assert code == 0, log
    assert '"event": "scheduler.started"' in log
    assert fleet.address in log
    assert '"event": "scheduler.stopped"' in log


async def test_it_starts_without_its_store(pki: Path, tmp_path: Path) -> None:
    """With no etcd at the address it neither ends nor loops in crashes: it serves its errors and still ends when asked."""
    fleet = Fleet(MemoryStore(lambda: 0.0), pki)
    nowhere = f"{LOOPBACK}:{free_ports(1)[0]}"
    async with program(write_config(tmp_path, pki, fleet, nowhere)) as process:
        assert process.stderr is not None
        async with asyncio.timeout(HANG_S):
            while b"store.unreached" not in await process.stderr.readline():
                pass
        code, log = await end(process)
    assert code == 0, log


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('log_level = "loud"', "log_level: 'loud' is no level"),
        ("colour = 1", "colour: this key is not known"),
    ],
)
async def test_a_wrong_configuration_is_told(pki: Path, tmp_path: Path, extra: str, message: str) -> None:
    """It ends with 1, the field that is wrong, and what to do."""
    config = write_config(tmp_path, pki, Fleet(MemoryStore(lambda: 0.0), pki), "127.0.0.1:1", extra)
    async with program(config) as process, asyncio.timeout(HANG_S):
        _, log = await process.communicate()
    assert process.returncode == 1
    assert message in log.decode()
    assert "next:" in log.decode()


async def test_another_scheduler_takes_over(memory: MemoryStore, pki: Path, tmp_path: Path) -> None:
    """Of two schedulers one leads and both serve; when the leader ends, the other places what comes next."""
    async with ObedientHost(memory, pki, tmp_path / "host").running() as local, Fleet(memory, pki).running() as second:
        async with Fleet(memory, pki).running() as first:
            for number, fleet in enumerate((first, second)):
                await fleet.knows(local.host_id)
                client = fleet.client(Role.TENANT, "demo")
                request = service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id(number), spec=to_message(spec(number)))
                await client.sandboxes.CreateSandbox(request)
                await local.ordered(sandbox_id(number))
        client = second.client(Role.TENANT, "demo")
        request = service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id(2), spec=to_message(spec(2)))
        await client.sandboxes.CreateSandbox(request)
        await local.ordered(sandbox_id(2))
        assert len(local.orders.orders) == 3


def own_config(folder: Path) -> tuple[Path, Path]:
    """Certificates that a test may spoil, and a configuration that uses them and signs for hosts."""
    create_pki(folder / "own")
    fleet = Fleet(MemoryStore(lambda: 0.0), folder / "own")
    config = write_config(folder, fleet.pki, fleet, "127.0.0.1:1")
    enrolment = f'[enrolment]\nlisten = "{fleet.enrolment_address}"\nca_key = "{fleet.pki}/ca.key"\n'
    config.write_text(config.read_text() + enrolment)
    return fleet.pki, config


def expire(pki: Path) -> None:
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400)
    authority = KeyPair((pki / "ca.crt").read_bytes(), (pki / "ca.key").read_bytes())
    add_certificate(pki, authority, Identity(Role.SCHEDULER, "scheduler"), long_ago)


def take_a_tenants(pki: Path) -> None:
    taken, mine = tls_files(pki, Role.TENANT, "demo"), tls_files(pki, Role.SCHEDULER, "scheduler")
    mine.certificate.write_bytes(taken.certificate.read_bytes())
    mine.key.write_bytes(taken.key.read_bytes())


SPOILED: dict[str, Callable[[Path], object]] = {
    "ended at": expire,
    "is for a tenant, not for a scheduler": take_a_tenants,
    "was not issued by the authority": lambda pki: (pki / "ca.crt").write_bytes(
        create_authority(datetime.datetime.now(datetime.UTC)).certificate
    ),
    "others may read": lambda pki: (pki / "ca.key").chmod(0o644),
    "holds no private key": lambda pki: (pki / "ca.key").write_text("noise"),
    "is not the key of": lambda pki: (pki / "ca.key").write_bytes(
        create_authority(datetime.datetime.now(datetime.UTC)).key
    ),
    "ca.key: No such file": lambda pki: (pki / "ca.key").unlink(),
}


@pytest.mark.parametrize(("message", "spoil"), SPOILED.items(), ids=SPOILED.keys())
async def test_a_wrong_certificate_is_told_at_start(
    tmp_path: Path, message: str, spoil: Callable[[Path], object]
) -> None:
    """Expired, another's, another fleet's, and an authority's key that is none or not alone: before anything is served."""
    pki, config = own_config(tmp_path)
    spoil(pki)
    async with program(config) as process, asyncio.timeout(HANG_S):
        _, log = await process.communicate()
    assert process.returncode == 1
    assert message in log.decode()
    assert "next:" in log.decode()
    assert "Traceback" not in log.decode()
