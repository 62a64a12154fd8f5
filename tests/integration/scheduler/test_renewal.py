"""A host renews its own certificate, with a real scheduler that signs and a real hostd that goes on."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fleet.credentials import install
from fleet.errors import NotPermittedError, UnavailableError
from fleet.identity import (
    Identity,
    KeyPair,
    Role,
    TlsFiles,
    certificate_span,
    host_server_name,
    issue_certificate,
)
from fleet.model.ids import HostId
from fleet.rpc import open_channel
from fleet.store.keyspace import host_issued
from fleet.store.memory import MemoryStore
from hostd.renewal import Renewal
from provisioning.embedded.etcd import LOOPBACK, free_ports
from provisioning.embedded.pki import EMBEDDED_HOST, create_pki, tls_files
from tests.integration.scheduler.hosting import running_hostd
from tests.integration.scheduler.parts import Fleet

HOST = HostId(EMBEDDED_HOST)
CALL_S, HANG_S = 20.0, 60.0


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    create_pki(tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
async def fleet(memory: MemoryStore, own: Path) -> AsyncIterator[Fleet]:
    async with Fleet(memory, own).running() as serving:
        await serving.answers()
        yield serving


def issue_short(pki: Path, lifetime: datetime.timedelta) -> TlsFiles:
    """The host's certificate, replaced by one that lives for so long."""
    authority = KeyPair((pki / "ca.crt").read_bytes(), (pki / "ca.key").read_bytes())
    files = tls_files(pki, Role.HOST, HOST)
    install(files, issue_certificate(authority, Identity(Role.HOST, HOST), now(), ("127.0.0.1",), lifetime))
    return files


async def test_it_is_renewed_when_a_third_is_left(fleet: Fleet, own: Path) -> None:
    """Not before; then with a new key, for the same identity, and the store notes the serial."""
    files = issue_short(own, datetime.timedelta(hours=3))
    old = files.load()[1]
    early, due = now() + datetime.timedelta(minutes=110), now() + datetime.timedelta(minutes=125)
    assert not await Renewal(HOST, files, [fleet.address], lambda: early).look()
    assert files.load()[1] == old
    nowhere = f"{LOOPBACK}:{free_ports(1)[0]}"
    assert await Renewal(HOST, files, [nowhere, fleet.address], lambda: due).look()
    new = files.load()[1]
    assert new.key != old.key
    files.check(Identity(Role.HOST, HOST), now())
    assert certificate_span(new.certificate)[1] > certificate_span(old.certificate)[1]
    assert len((await fleet.store.list_prefix(host_issued(HOST))).entries) == 1


@pytest.mark.parametrize("schedulers", [[], ["127.0.0.1:1"]], ids=["none named", "none there"])
async def test_one_that_cannot_be_renewed_is_told(own: Path, schedulers: list[str]) -> None:
    """The files stay as they are, and the error says what to do."""
    files = issue_short(own, datetime.timedelta(hours=3))
    old = files.load()
    with pytest.raises(UnavailableError) as caught:
        await Renewal(HOST, files, schedulers, lambda: now() + datetime.timedelta(hours=2, minutes=30)).look()
    assert caught.value.code in ("certificate_ending", "unreachable")
    assert caught.value.next_step
    assert files.load() == old


async def test_another_hosts_name_is_not_renewed(fleet: Fleet, own: Path) -> None:
    """A host gets certificates of its own name only, whatever it asks for."""
    files = issue_short(own, datetime.timedelta(hours=3))
    renewal = Renewal(HostId("rack1-08"), files, [fleet.address], lambda: now() + datetime.timedelta(hours=2.5))
    with pytest.raises(NotPermittedError) as caught:
        await renewal.look()
    assert caught.value.code == "identity_mismatch"


async def test_hostd_goes_on_under_a_new_certificate(fleet: Fleet, own: Path, tmp_path: Path) -> None:
    """Its certificate lives for seconds: hostd renews it, serves calls before and after, and past the old one's end."""
    lifetime = datetime.timedelta(seconds=9)
    files = issue_short(own, lifetime)
    old = files.load()[1].certificate
    caller = tls_files(own, Role.SCHEDULER, "scheduler")
    async with running_hostd(own, tmp_path / "hostd", fleet.store, schedulers=(fleet.address,)) as address:
        async with asyncio.timeout(HANG_S):
            while now() < certificate_span(old)[1] + datetime.timedelta(seconds=2):
                async with open_channel(address, caller, host_server_name(HOST)) as channel:
                    stub = health_pb2_grpc.HealthStub(channel)
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                await asyncio.sleep(0.2)
    assert files.load()[1].certificate != old
    assert certificate_span(files.load()[1].certificate)[1] > now() + datetime.timedelta(days=300)
