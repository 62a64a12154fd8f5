"""A machine joins: token, request, certificate, over real TLS; and everything that must not get it one."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from bedplate.host.v1 import enrolment_pb2, enrolment_pb2_grpc
from fleet.certificates import check_files, parse_identity
from fleet.codec import decode, encode
from fleet.enrolment import JoinToken, make_request, parse_token
from fleet.errors import BedplateError
from fleet.identity import SCHEDULER_SERVER_NAME, Identity, Role, TlsFiles
from fleet.model.enrolment import EnrolmentToken, IssuedCertificate
from fleet.model.ids import HostId
from fleet.rpc import channel_options, open_channel, translated
from fleet.store.keyspace import ROOT, TOKENS, host_issued, token_key
from fleet.store.port import Put, Store
from scheduler.api.failures import FAILURES_MAX
from tests.integration.scheduler.parts import Client, Fleet

NEW = HostId("rack1-07")
CALL_S = 20.0


@pytest.fixture
async def operator(fleet: Fleet) -> Client:
    await fleet.answers()
    return fleet.client(Role.OPERATOR, "operator")


@pytest.fixture
async def join(fleet: Fleet) -> AsyncIterator[Any]:
    """The enrolment listener as a new machine sees it: it trusts the authority and shows nothing."""
    trust = grpc.ssl_channel_credentials((fleet.pki / "ca.crt").read_bytes())
    options = channel_options(SCHEDULER_SERVER_NAME)
    async with grpc.aio.secure_channel(fleet.enrolment_address, trust, options=options) as channel:
        yield enrolment_pb2_grpc.JoinServiceStub(channel)


async def token_for(operator: Client, host_id: str = NEW, ttl_s: int = 3600) -> JoinToken:
    request = enrolment_pb2.CreateTokenRequest(host_id=host_id, ttl_s=ttl_s)
    with translated("scheduler"):
        return parse_token((await operator.enrolment.CreateToken(request, timeout=CALL_S)).token)


async def enrol(join: Any, token: JoinToken, csr: bytes | None = None, **changes: str) -> Any:
    fields = {"token_id": token.token_id, "secret": token.secret, **changes}
    request = enrolment_pb2.EnrolRequest(**fields, csr=csr or make_request(Identity(Role.HOST, token.host_id))[1])
    with translated("scheduler"):
        return await join.Enrol(request, timeout=CALL_S)


async def code_of(call: Any) -> str:
    with pytest.raises(BedplateError) as caught:
        await call
    assert caught.value.next_step
    return caught.value.code


async def test_a_machine_joins(operator: Client, join: Any, fleet: Fleet, store: Store, tmp_path: Path) -> None:
    """Its certificate is its own and good for what hosts do; the store has a hash of the secret and notes the serial."""
    token = await token_for(operator)
    kept = [entry.value for entry in (await store.list_prefix(ROOT)).entries]
    assert not any(token.secret.encode() in value for value in kept)
    key, csr = make_request(Identity(Role.HOST, NEW))
    chain = await enrol(join, token, csr)
    files = TlsFiles(tmp_path / "ca.crt", tmp_path / "host.crt", tmp_path / "host.key")
    for path, content in ((files.ca, chain.ca), (files.certificate, chain.certificate), (files.key, key)):
        path.write_bytes(content)
    check_files(files, Identity(Role.HOST, NEW), datetime.datetime.now(datetime.UTC))
    (note,) = (await store.list_prefix(host_issued(NEW))).entries
    serial = f"{x509.load_pem_x509_certificate(chain.certificate).serial_number:x}"
    assert decode(IssuedCertificate, note.value).serial == serial
    assert note.lease_id != 0
    async with open_channel(fleet.address, files, SCHEDULER_SERVER_NAME) as channel:
        _, again = make_request(Identity(Role.HOST, NEW))
        stub: Any = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
        renewed = await stub.RenewCertificate(enrolment_pb2.RenewCertificateRequest(csr=again), timeout=CALL_S)
        assert parse_identity(renewed.certificate) == Identity(Role.HOST, NEW)
        _, others = make_request(Identity(Role.HOST, "rack1-08"))
        call = stub.RenewCertificate(enrolment_pb2.RenewCertificateRequest(csr=others), timeout=CALL_S)
        with pytest.raises(BedplateError) as caught, translated("scheduler"):
            await call
        assert caught.value.code == "identity_mismatch"


async def test_a_token_is_used_once(operator: Client, join: Any) -> None:
    """A second machine gets nothing for it; the first one, whose answer was lost, gets the same certificate again."""
    token = await token_for(operator)
    _, csr = make_request(Identity(Role.HOST, NEW))
    first = await enrol(join, token, csr)
    assert (await enrol(join, token, csr)).certificate == first.certificate
    assert await code_of(enrol(join, token)) == "token_used"
    assert await code_of(enrol(join, token, b"noise")) == "csr_invalid"


async def test_of_many_at_once_one_gets_it(operator: Client, fleet: Fleet, store: Store) -> None:
    """The transaction is the safety: machines that race with one token get one certificate between them."""
    token = await token_for(operator)
    trust = grpc.ssl_channel_credentials((fleet.pki / "ca.crt").read_bytes())
    options = channel_options(SCHEDULER_SERVER_NAME)
    # The limit of failures is per address, so there are no more rivals than it lets fail.
    async with grpc.aio.secure_channel(fleet.enrolment_address, trust, options=options) as channel:
        stub = enrolment_pb2_grpc.JoinServiceStub(channel)
        calls = [enrol(stub, token) for _ in range(FAILURES_MAX)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    won = [one for one in outcomes if not isinstance(one, BaseException)]
    codes = {one.code for one in outcomes if isinstance(one, BedplateError)}
    assert len(won) == 1
    assert codes == {"token_used"}
    assert len((await store.list_prefix(host_issued(NEW))).entries) == 1


async def test_what_is_refused(operator: Client, join: Any, store: Store) -> None:
    """A wrong secret, an unknown token, another host's request and an expired token each say so, and spend nothing."""
    token = await token_for(operator)
    assert await code_of(enrol(join, token, secret="A" * 43)) == "token_unknown"
    assert await code_of(enrol(join, token, token_id="rack1-07-00000000")) == "token_unknown"
    _, others = make_request(Identity(Role.HOST, "rack1-08"))
    assert await code_of(enrol(join, token, others)) == "identity_mismatch"
    kept = await store.get(token_key(token.token_id))
    assert kept is not None
    stale = decode(EnrolmentToken, kept.value)
    old = EnrolmentToken(
        stale.token_id, stale.host_id, stale.secret_sha256, stale.by, stale.created_at_ms, stale.created_at_ms
    )
    await store.transact([], [Put(kept.key, encode(old), kept.lease_id)])
    assert await code_of(enrol(join, token)) == "token_expired"
    assert (await store.list_prefix(host_issued(NEW))).entries == ()


async def test_guessing_is_bounded(operator: Client, join: Any) -> None:
    """After a handful of failures the address waits, with a right token too; no guess is even looked at."""
    token = await token_for(operator)
    for number in range(FAILURES_MAX):
        assert await code_of(enrol(join, token, token_id=f"rack1-07-{number:08x}")) == "token_unknown"
    assert await code_of(enrol(join, token)) == "failures_exhausted"


async def test_what_is_too_large_is_not_read(operator: Client, join: Any) -> None:
    """A stranger's request past the limit ends by its size."""
    token = await token_for(operator)
    assert await code_of_size(enrol(join, token, b"x" * 100_000)) == "call_resource_exhausted"


async def code_of_size(call: Any) -> str:
    with pytest.raises(BedplateError) as caught:
        await call
    return caught.value.code


@pytest.mark.parametrize(
    ("host_id", "ttl_s", "field"),
    [("", 60, "host_id"), ("A/b", 60, "host_id"), ("x" * 64, 60, "host_id"), (NEW, 59, "ttl"), (NEW, 604_801, "ttl")],
)
async def test_tokens_that_are_not_made(operator: Client, store: Store, host_id: str, ttl_s: int, field: str) -> None:
    """A host's id that is none and a time out of bounds are refused by field, and nothing is kept."""
    request = enrolment_pb2.CreateTokenRequest(host_id=host_id, ttl_s=ttl_s)
    with pytest.raises(BedplateError) as caught, translated("scheduler"):
        await operator.enrolment.CreateToken(request, timeout=CALL_S)
    assert getattr(caught.value, "field", "") == field
    assert (await store.list_prefix(TOKENS)).entries == ()
