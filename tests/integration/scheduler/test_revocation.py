"""What is withdrawn is refused by scheduler and hosts, and what is under way under it ends: real servers, real certificates."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bedplate.host.v1 import enrolment_pb2
from bedplate.host.v1 import service_pb2 as host_pb2
from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.certificates import create_authority
from fleet.codec import to_message
from fleet.errors import BedplateError, NotPermittedError
from fleet.identity import Identity, KeyPair, Role, TlsFiles, host_server_name
from fleet.model.ids import HostId
from fleet.revocation import make_list
from fleet.rpc import open_channel, translated
from fleet.store.etcd import open_etcd
from fleet.store.keyspace import TOKENS, barred_key, cordon_key
from fleet.store.memory import MemoryStore
from fleet.store.port import Store, StoreUnavailableError
from provisioning.embedded.etcd import LOOPBACK, free_ports, start_etcd
from provisioning.embedded.pki import EMBEDDED_HOST, add_certificate, create_pki, tls_files
from tests.integration.scheduler.hosting import running_hostd
from tests.integration.scheduler.parts import Client, Fleet, ObedientHost
from tests.unit.scheduler.build import sandbox_id, spec

CALL_S = 20.0


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def authority_of(pki: Path) -> KeyPair:
    return KeyPair((pki / "ca.crt").read_bytes(), (pki / "ca.key").read_bytes())


def serial_of(files: TlsFiles) -> int:
    return x509.load_pem_x509_certificate(files.certificate.read_bytes()).serial_number


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Certificates that a test may withdraw without taking them from the others."""
    create_pki(tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
async def operator(fleet: Fleet) -> Client:
    await fleet.answers()
    return fleet.client(Role.OPERATOR, "operator")


@pytest.fixture
async def fleet(store: Store, own: Path) -> AsyncIterator[Fleet]:
    async with Fleet(store, own).running() as serving:
        yield serving


async def publish(operator: Client, crl: bytes) -> Any:
    request = enrolment_pb2.PublishRevocationsRequest(crl=crl)
    with translated("scheduler"):
        return await operator.enrolment.PublishRevocations(request, timeout=CALL_S)


async def refused(call: Any) -> None:
    """The call ends because its certificate was withdrawn, with a next step."""
    with pytest.raises(NotPermittedError) as caught, translated("server"):
        await call
    assert caught.value.code == "certificate_revoked"
    assert caught.value.next_step


@asynccontextmanager
async def memory_store() -> AsyncIterator[MemoryStore]:
    opened = MemoryStore(monotonic)
    yield opened
    await opened.close()


async def test_a_withdrawn_certificate_is_refused_and_its_streams_end(
    fleet: Fleet, operator: Client, own: Path
) -> None:
    """Its watch ends with the reason, its next call is refused, health too; others go on, and a new certificate is let in."""
    demo, other = fleet.client(Role.TENANT, "demo"), fleet.client(Role.TENANT, "other")
    made = service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id(0), spec=to_message(spec(0)))
    await demo.sandboxes.CreateSandbox(made)
    watch = demo.sandboxes.WatchSandbox(service_pb2.GetSandboxRequest(sandbox="box-0"), timeout=CALL_S)
    await watch.read()
    revoked = serial_of(tls_files(own, Role.TENANT, "demo"))
    listed = make_list(authority_of(own), {revoked: now()}, now())
    assert ((reply := await publish(operator, listed)).added, reply.known) == (1, 0)

    async def to_its_end() -> None:
        while await watch.read() is not grpc.aio.EOF:
            continue

    await refused(to_its_end())
    await refused(demo.sandboxes.ListSandboxes(service_pb2.ListSandboxesRequest(), timeout=CALL_S))
    check = health_pb2_grpc.HealthStub(demo.channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
    await refused(check)
    await other.sandboxes.ListSandboxes(service_pb2.ListSandboxesRequest(), timeout=CALL_S)
    assert ((reply := await publish(operator, listed)).added, reply.known) == (0, 1)
    add_certificate(own, authority_of(own), Identity(Role.TENANT, "demo"), now())
    await fleet.client(Role.TENANT, "demo").sandboxes.ListSandboxes(service_pb2.ListSandboxesRequest(), timeout=CALL_S)


async def test_a_foreign_list_withdraws_nobody(operator: Client) -> None:
    """What another authority has signed is refused, and the operator who sent it still works."""
    with pytest.raises(BedplateError) as caught:
        await publish(operator, make_list(create_authority(now()), {1: now()}, now()))
    assert caught.value.code == "crl_invalid"
    await operator.hosts.ListHosts(host_pb2.ListHostsRequest(), timeout=CALL_S)


async def test_a_host_is_revoked_by_its_name(fleet: Fleet, operator: Client, own: Path, tmp_path: Path) -> None:
    """Whatever it holds is refused, its tokens are void, nothing is placed on it; another host's token stays."""
    store = fleet.store
    token = enrolment_pb2.CreateTokenRequest(ttl_s=600)
    async with ObedientHost(store, own, tmp_path / "host").running() as local:
        await fleet.knows(local.host_id)
        for host_id in (local.host_id, f"{local.host_id}-2"):
            token.host_id = host_id
            await operator.enrolment.CreateToken(token, timeout=CALL_S)
        request = enrolment_pb2.RevokeHostRequest(host_id=local.host_id, reason="stolen")
        await operator.enrolment.RevokeHost(request, timeout=CALL_S)
        as_host = fleet.client(Role.HOST, local.host_id)
        renewal = enrolment_pb2.RenewCertificateRequest()
        await until_refused(lambda: as_host.enrolment.RenewCertificate(renewal, timeout=CALL_S))
        (left,) = (await store.list_prefix(TOKENS)).entries
        assert left.key.startswith(f"{TOKENS}{local.host_id}-2-")
        assert await store.get(cordon_key(local.host_id)) is not None
        assert await store.get(barred_key(local.host_id)) is not None


async def until_refused(call: Any) -> None:
    """Returns when the server has heard that the certificate is withdrawn; until then calls may pass or fail otherwise."""
    async with asyncio.timeout(CALL_S):
        while True:
            try:
                with translated("server"):
                    await call()
            except BedplateError as error:
                if error.code == "certificate_revoked":
                    return


async def test_an_unknown_host_is_not_revoked(operator: Client) -> None:
    """A typing error is told, and bars nobody."""
    for host_id in ("gone", "../x", ""):
        call = operator.enrolment.RevokeHost(enrolment_pb2.RevokeHostRequest(host_id=host_id), timeout=CALL_S)
        with pytest.raises(BedplateError) as caught, translated("scheduler"):
            await call
        assert caught.value.code == "host_unknown"


async def test_hosts_refuse_a_withdrawn_scheduler(own: Path, tmp_path: Path) -> None:
    """hostd hears of it from the store: a scheduler's certificate that was withdrawn reads nothing on a host any more."""
    async with memory_store() as store, Fleet(store, own).running() as fleet:
        await fleet.answers()
        async with running_hostd(own, tmp_path / "hostd", store) as address:
            files = tls_files(own, Role.SCHEDULER, "scheduler")
            async with open_channel(address, files, host_server_name(HostId(EMBEDDED_HOST))) as channel:
                stub: Any = service_pb2_grpc.OutputServiceStub(channel)
                wanted = service_pb2.ReadOutputRequest(sandbox="a" * 12, tenant="demo")
                with pytest.raises(BedplateError) as caught, translated("host"):
                    await stub.ReadOutput(wanted, timeout=CALL_S).read()
                assert caught.value.code == "sandbox_unknown"
                operator = fleet.client(Role.OPERATOR, "operator")
                await publish(operator, make_list(authority_of(own), {serial_of(files): now()}, now()))
                await until_refused(lambda: stub.ReadOutput(wanted, timeout=CALL_S).read())


@pytest.mark.root
async def test_etcd_refuses_a_withdrawn_certificate(own: Path, tmp_path: Path) -> None:
    """etcd reads the authority's list at each handshake: no restart, and the other programs' certificates go on."""
    client_port, peer_port = free_ports(2)
    etcd = start_etcd(tmp_path / "etcd", own, client_port, peer_port)
    endpoint, host = f"{LOOPBACK}:{client_port}", tls_files(own, Role.HOST, EMBEDDED_HOST)
    try:
        for files in (host, tls_files(own, Role.SCHEDULER, "scheduler")):
            await ask_etcd(endpoint, files)
        (own / "ca.crl").write_bytes(make_list(authority_of(own), {serial_of(host): now()}, now()))
        with pytest.raises(StoreUnavailableError):
            await ask_etcd(endpoint, host)
        await ask_etcd(endpoint, tls_files(own, Role.SCHEDULER, "scheduler"))
    finally:
        etcd.stop()


async def ask_etcd(endpoint: str, files: TlsFiles) -> None:
    """One call over a connection of its own."""
    store = open_etcd([endpoint], files)
    try:
        await store.get("nothing")
    finally:
        await store.close()
