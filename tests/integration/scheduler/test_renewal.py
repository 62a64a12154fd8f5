"""A host renews its own certificate, with a real scheduler that signs and a real hostd that goes on."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fleet.certificates import certificate_span, check_files, issue_certificate
from fleet.codec import encode
from fleet.credentials import install
from fleet.errors import BedplateError, NotPermittedError, UnavailableError
from fleet.identity import Identity, KeyPair, Role, TlsFiles, host_server_name
from fleet.model.enrolment import HostBar, Revocation
from fleet.model.ids import HostId
from fleet.revocation import serial_of
from fleet.rpc import open_channel
from fleet.store.keyspace import ROOT, barred_key, host_issued, revoked_key
from fleet.store.memory import MemoryStore
from fleet.store.mirror import Mirror
from fleet.store.port import Put
from hostd.renewal import Renewal
from provisioning.embedded.etcd import LOOPBACK, free_ports
from provisioning.embedded.pki import EMBEDDED_HOST, create_pki, tls_files
from scheduler.api.revocation import Revoker
from scheduler.state import FleetState
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
    check_files(files, Identity(Role.HOST, HOST), now())
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


@pytest.mark.slow
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


class RevokingStore(MemoryStore):
    """A store in which a host is barred while its renewal is being written: the moment that a thief would wait for."""

    is_barring = False

    async def grant_lease(self, ttl_s: float) -> int:
        if self.is_barring:
            bar = HostBar(HOST, int(now().timestamp() * 1000) - 60_000, "ops")
            await self.transact([], [Put(barred_key(HOST), encode(bar))])
        return await super().grant_lease(ttl_s)


async def test_a_revoked_host_cannot_outrun_its_bar(own: Path) -> None:
    """A renewal that began before the bar gets no certificate that is younger than it, and nothing of it is kept."""
    store = RevokingStore(monotonic)
    async with Fleet(store, own).running() as fleet:
        await fleet.answers()
        files = issue_short(own, datetime.timedelta(hours=3))
        renewal = Renewal(HOST, files, [fleet.address], lambda: now() + datetime.timedelta(hours=2.5))
        old = files.load()
        store.is_barring = True
        with pytest.raises(BedplateError) as caught:
            await renewal.look()
        assert caught.value.code == "renewal_outrun"
        assert files.load() == old
        assert (await store.list_prefix(host_issued(HOST))).entries == ()


@pytest.mark.parametrize("kind", ["serial", "bar"])
async def test_the_store_is_asked_at_a_renewal(fleet: Fleet, own: Path, kind: str) -> None:
    """What the gatekeeper has not heard yet counts all the same."""
    files = issue_short(own, datetime.timedelta(hours=3))
    revoker = Revoker(fleet.store, FleetState(Mirror(fleet.store, ROOT)), lambda: 0)
    certificate = files.load()[1].certificate
    assert len(await revoker.check_unrevoked(certificate, HOST)) == 2
    at_ms = int(now().timestamp() * 1000) + 60_000
    write = {
        "serial": Put(revoked_key(serial_of(certificate)), encode(Revocation(serial_of(certificate), "ops", at_ms))),
        "bar": Put(barred_key(HOST), encode(HostBar(HOST, at_ms, "ops"))),
    }[kind]
    await fleet.store.transact([], [write])
    with pytest.raises(NotPermittedError) as caught:
        await revoker.check_unrevoked(certificate, HOST)
    assert caught.value.code == "certificate_revoked"
