"""`python -m hostd` as an operator runs it: refused with a reason, or serving whatever is away, until it is asked to end."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Interface
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fleet.identity import Role, host_server_name
from fleet.model.ids import HostId
from fleet.rpc import open_channel
from fleet.store.etcd import open_etcd
from fleet.store.keyspace import alive_key
from hostd.drivers.network import LinuxNetwork, NetworkSettings
from provisioning.embedded.etcd import LOOPBACK, free_ports, start_etcd
from provisioning.embedded.libvirt import QEMU_ID
from provisioning.embedded.pki import EMBEDDED_HOST, create_pki, tls_files

HANG_S, CALL_S = 40.0, 10.0
# The program needs libvirt's binding, which the part without root does without.
pytestmark = pytest.mark.root
HOST = HostId(EMBEDDED_HOST)
BRIDGE = NetworkSettings("bedplate0", IPv4Interface("10.77.0.1/16"), tap_uid=QEMU_ID, tap_gid=QEMU_ID)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates of one fleet."""
    folder = tmp_path_factory.mktemp("hostd") / "pki"
    create_pki(folder)
    return folder


class Site:
    """A folder for one host, the ports of its fleet, and no other program running."""

    def __init__(self, folder: Path, pki: Path) -> None:
        self.folder = folder
        self.pki = pki
        self.tls = tls_files(pki, Role.HOST, HOST)
        self.port, self.etcd_port, self.peer_port = free_ports(3)
        self.address = f"{LOOPBACK}:{self.port}"
        self.etcd = f"{LOOPBACK}:{self.etcd_port}"
        self.config = folder / "hostd.toml"
        self.write_config()

    def write_config(self, old: str = "", new: str = "") -> None:
        """A whole configuration, with one text of it replaced."""
        text = (
            f'host_id = "{HOST}"\netcd = ["{self.etcd}"]\nlisten = "{self.address}"\nqemu_user = "{QEMU_ID}"\n'
            f'libvirt_uri = "qemu+unix:///system?socket={self.folder}/nowhere"\nimages_dir = "{self.folder}/images"\n'
            f'state_dir = "{self.folder}/state"\nrun_dir = "{self.folder}/run"\nlog_dir = "{self.folder}/log"\n'
            f'[tls]\nca = "{self.tls.ca}"\ncertificate = "{self.tls.certificate}"\nkey = "{self.tls.key}"\n'
        )
        self.config.write_text(text.replace(old, new) if old else text)

    @asynccontextmanager
    async def program(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """hostd with that configuration; killed if a test leaves it running."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hostd", "--config", str(self.config), stderr=asyncio.subprocess.PIPE
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()

    async def refusal(self) -> str:
        """What hostd says when it does not start."""
        async with self.program() as process, asyncio.timeout(HANG_S):
            _, said = await process.communicate()
        assert process.returncode == 1, said
        return said.decode()


@pytest.fixture
def site(tmp_path: Path, pki: Path) -> Site:
    """A host that was never started."""
    return Site(tmp_path, pki)


@pytest.fixture
async def networked(site: Site) -> AsyncIterator[Site]:
    """A host that may make its bridge; the bridge is gone afterwards."""
    assert os.environ.get("BEDPLATE_PRIVATE") == "1", "this test changes the network: run it in private namespaces"
    yield site
    await LinuxNetwork(BRIDGE).remove_bridge()


async def heard(process: asyncio.subprocess.Process, *words: str) -> None:
    """Returns when the log has said each of them."""
    assert process.stderr is not None
    left = set(words)
    async with asyncio.timeout(HANG_S):
        while left:
            line = (await process.stderr.readline()).decode()
            assert line, f"hostd ended with {process.returncode} before it said {left}"
            left -= {word for word in left if word in line}


async def end(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """Asks it to end; its exit code and what it still wrote."""
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(HANG_S):
        _, log = await process.communicate()
    return process.returncode, log.decode()


async def serves(site: Site) -> bool:
    """Whether its server says so."""
    async with open_channel(site.address, site.tls, host_server_name(HOST)) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f'host_id = "{HOST}"\n', "", "host_id: it is missing"),
        ("[tls]", "colour = 1\n[tls]", "colour: this key is not known"),
        (f"host-{HOST}.key", "gone.key", "gone.key: No such file or directory"),
        (f"host-{HOST}.key", "scheduler-scheduler.key", "tls.key"),
        (f'host_id = "{HOST}"', 'host_id = "rack1-07"', f"is for host {HOST}, not for host rack1-07"),
        (f'qemu_user = "{QEMU_ID}"', 'qemu_user = "nobody-of-that-name"', "nobody-of-that-name"),
    ],
)
async def test_what_is_missing_is_told(site: Site, old: str, new: str, message: str) -> None:
    """It ends with 1, says what is missing and what to do, and shows no traceback."""
    site.write_config(old, new)
    said = await site.refusal()
    assert message in said
    assert "next:" in said
    assert "Traceback" not in said


async def test_it_starts_and_ends_with_libvirt_and_etcd_away(networked: Site) -> None:
    """After a power cut hostd may be the first to be there: it says what it lacks, serves, registers later, and ends with 0."""
    async with networked.program() as process:
        await heard(process, "hostd.started", '"store.unreached"', '"pass.failed"')
        assert await serves(networked)
        etcd = start_etcd(networked.folder / "etcd", networked.pki, networked.etcd_port, networked.peer_port)
        try:
            await heard(process, '"host.registered"')
            code, log = await end(process)
            store = open_etcd([networked.etcd], networked.tls)
            try:
                assert await store.get(alive_key(HOST)) is None
            finally:
                await store.close()
        finally:
            etcd.stop()
    assert (code, "hostd.stopped" in log, "Traceback" in log) == (0, True, False), log


async def test_one_state_folder_has_one_hostd(networked: Site) -> None:
    """A second hostd would give orders of its own to the same VMs: it is refused, and the first goes on."""
    async with networked.program() as process:
        await heard(process, "hostd.started")
        said = await networked.refusal()
        assert f"another hostd uses {networked.folder}/state" in said
        assert "next: stop it first" in said
        assert await serves(networked)
    # The first was killed: its lock went with it.
    async with networked.program() as process:
        await heard(process, "hostd.started")
        assert (await end(process))[0] == 0
