"""EnrolmentService and JoinService: tokens for new hosts, and certificates against them.

    CreateToken: token put under its lease --> Enrol: token checked, CSR signed, then one transaction spends the token and notes
    the certificate --> RenewCertificate: the host's own certificate is the proof

The transaction is the safety: of two that spend one token, one commits. What was signed and not committed is thrown away.
"""

from collections.abc import Callable
from typing import Any

import structlog
from cryptography import x509

from bedplate.host.v1 import enrolment_pb2, enrolment_pb2_grpc
from fleet.codec import decode, encode
from fleet.enrolment import hash_secret, is_secret, is_token_id, make_token, read_request
from fleet.errors import BedplateError, ConflictError, InvalidSpecError, NotFoundError, NotPermittedError
from fleet.gatekeeper import caller_of, certificate_of
from fleet.identity import Identity, Role, TlsFiles
from fleet.model.enrolment import EnrolmentToken
from fleet.model.ids import HostId, is_dns_label
from fleet.store.keyspace import issued_key, token_key
from fleet.store.port import KeyValue, Put, Store, Unmoved
from scheduler.api.failures import FailureLimit, address_of
from scheduler.api.revocation import Revoker
from scheduler.issuer import Issuer, Signed

TTL_S_MIN, TTL_S_MAX = 60, 7 * 24 * 3600
# A token's key outlives it by so much, so that whoever comes late is told so.
MEMORY_S = 3600
# The lease of a note must not end before the certificate: clocks differ.
NOTE_MARGIN_S = 3600
ATTEMPTS_MAX = 3

log = structlog.get_logger()


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServiceServicer):
    """For operators and for hosts that have a certificate."""

    def __init__(
        self, store: Store, revoker: Revoker, tls: TlsFiles, issuer: Issuer | None, now_ms: Callable[[], int]
    ) -> None:
        self._store = store
        self._revoker = revoker
        self._tls = tls
        self._issuer = issuer
        self._now_ms = now_ms

    async def CreateToken(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's names)
        """A token for one host, good for `ttl_s` and once."""
        issuer = _needed(self._issuer)
        if not is_dns_label(request.host_id):
            next_step = "use 1 to 63 characters of a-z, 0-9 and -"
            raise InvalidSpecError("host_id_invalid", "it is no host's id", next_step, field="host_id")
        if not TTL_S_MIN <= request.ttl_s <= TTL_S_MAX:
            message = f"{request.ttl_s} s is not {TTL_S_MIN} s to {TTL_S_MAX // 86_400} days"
            raise InvalidSpecError("ttl_invalid", message, "choose a time within", field="ttl")
        token = make_token(HostId(request.host_id), issuer.ca)
        now_ms = self._now_ms()
        kept = EnrolmentToken(
            token_id=token.token_id,
            host_id=token.host_id,
            secret_sha256=hash_secret(token.secret),
            by=caller_of(context).name,
            created_at_ms=now_ms,
            expires_at_ms=now_ms + request.ttl_s * 1000,
        )
        key = token_key(token.token_id)
        lease_id = await self._store.grant_lease(request.ttl_s + MEMORY_S)
        committed = await self._store.transact([Unmoved(key, 0)], [Put(key, encode(kept), lease_id)])
        if not committed.is_committed:
            raise ConflictError("token_raced", "a token of that id exists", "ask again")
        log.info("token.created", token_id=token.token_id, host_id=token.host_id, by=kept.by)
        return enrolment_pb2.CreateTokenResponse(token=token.render(), expires_at_ms=kept.expires_at_ms)

    async def RenewCertificate(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A new certificate for the caller, of the same identity."""
        issuer, caller = _needed(self._issuer), caller_of(context)
        # What the gatekeeper knows may be a moment old: a host that is being revoked must not get a certificate that is younger
        # than its bar. So the store is asked, and nothing is handed out unless all of it still holds.
        unrevoked = await self._revoker.check_unrevoked(certificate_of(context), HostId(caller.name))
        signed = issuer.sign(request.csr, HostId(caller.name))
        lease_id = await self._store.grant_lease(_note_ttl_s(signed))
        committed = await self._store.transact(unrevoked, [_note(signed, lease_id)])
        if not committed.is_committed:
            await self._store.revoke_lease(lease_id)
            raise ConflictError("renewal_outrun", f"host {caller.name} was revoked meanwhile", "ask an operator")
        log.info("certificate.renewed", host_id=caller.name, serial=signed.issued.serial)
        return enrolment_pb2.IssuedChain(certificate=signed.certificate, ca=issuer.ca)

    async def RevokeHost(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Every certificate of a host that was issued until now is refused, by each program within seconds."""
        return await self._revoker.revoke_host(request, caller_of(context).name)

    async def PublishRevocations(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The serials in the authority's list are refused, by each program within seconds."""
        ca, _ = self._tls.load()
        return await self._revoker.publish(request.crl, ca, caller_of(context).name)


class JoinService(enrolment_pb2_grpc.JoinServiceServicer):
    """For machines that have nothing but a token."""

    def __init__(self, store: Store, issuer: Issuer, limit: FailureLimit, now_ms: Callable[[], int]) -> None:
        self._store = store
        self._issuer = issuer
        self._limit = limit
        self._now_ms = now_ms

    async def Enrol(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The host's first certificate, for a token that is good; an address that fails too often waits."""
        address = address_of(context.peer())
        self._limit.check(address)
        try:
            certificate = await self._enrol(request)
        except (NotPermittedError, InvalidSpecError) as error:
            self._limit.note(address)
            log.warning("enrolment.refused", address=address, code=error.code)
            raise
        return enrolment_pb2.IssuedChain(certificate=certificate, ca=self._issuer.ca)

    async def _enrol(self, request: Any) -> bytes:
        for _ in range(ATTEMPTS_MAX):
            found = await self._store.get(token_key(request.token_id)) if is_token_id(request.token_id) else None
            token = self._check(found, request.secret)
            assert found is not None
            if token.certificate:
                return _spent_for(token, request.csr)
            signed = self._issuer.sign(request.csr, token.host_id)
            if await self._spend(found, token, signed):
                log.info("host.enrolled", host_id=token.host_id, token_id=token.token_id, serial=signed.issued.serial)
                return signed.certificate
        raise ConflictError("token_moved", "the token is being used by another machine too", "try again")

    def _check(self, found: KeyValue | None, secret: str) -> EnrolmentToken:
        """The token, if it is known by that secret and not past its time."""
        token = _decoded(found)
        if token is None or not is_secret(secret, token.secret_sha256):
            message = "no such token: it was never given out, or it has long expired"
            raise NotPermittedError("token_unknown", message, _NEXT_TOKEN)
        if self._now_ms() >= token.expires_at_ms:
            raise NotPermittedError("token_expired", f"the token for {token.host_id} has expired", _NEXT_TOKEN)
        return token

    async def _spend(self, found: KeyValue, token: EnrolmentToken, signed: Signed) -> bool:
        spent = EnrolmentToken(
            token_id=token.token_id,
            host_id=token.host_id,
            secret_sha256=token.secret_sha256,
            by=token.by,
            created_at_ms=token.created_at_ms,
            expires_at_ms=token.expires_at_ms,
            certificate=signed.certificate.decode(),
        )
        lease_id = await self._store.grant_lease(_note_ttl_s(signed))
        writes = [Put(found.key, encode(spent), found.lease_id), _note(signed, lease_id)]
        committed = await self._store.transact([Unmoved(found.key, found.mod_revision)], writes)
        if not committed.is_committed:
            await self._store.revoke_lease(lease_id)
        return committed.is_committed


_NEXT_TOKEN = "ask an operator for a new one: mb host token HOST"  # noqa: S105 (what to do, not a token)


def _needed(issuer: Issuer | None) -> Issuer:
    if issuer is None:
        message = "this scheduler signs no certificates"
        raise NotFoundError("enrolment_off", message, "give it [enrolment], or use mb pki issue")
    return issuer


def _decoded(found: KeyValue | None) -> EnrolmentToken | None:
    if found is None:
        return None
    try:
        return decode(EnrolmentToken, found.value)
    except BedplateError:
        log.warning("value.unreadable", key=found.key)
        return None


def _spent_for(token: EnrolmentToken, csr: bytes) -> bytes:
    """The certificate that the token was spent for, to the machine whose answer was lost: it has the same key."""
    key = read_request(csr, Identity(Role.HOST, token.host_id))
    if x509.load_pem_x509_certificate(token.certificate.encode()).public_key() != key:
        raise NotPermittedError("token_used", f"the token for {token.host_id} was used already", _NEXT_TOKEN)
    return token.certificate.encode()


def _note(signed: Signed, lease_id: int) -> Put:
    return Put(issued_key(signed.issued.host_id, signed.issued.serial), encode(signed.issued), lease_id)


def _note_ttl_s(signed: Signed) -> float:
    return (signed.issued.ends_at_ms - signed.issued.at_ms) / 1000 + NOTE_MARGIN_S
