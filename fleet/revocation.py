"""Certificates that are refused before their end: the authority's signed list of serials, and what a program knows of it.

A list (CRL, RFC 5280) is a file beside the authority; the store has the same serials for the programs, and for each host that was
revoked the moment before which whatever was issued to it is refused.
"""

import datetime
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.certificates import BACKDATE, CA_DAYS, UNREADABLE, parse_identity
from fleet.errors import InvalidSpecError, NotPermittedError
from fleet.identity import Identity, KeyPair, Role
from fleet.model.ids import HostId

# Ten thousand lost certificates are far past any fleet; a list of so many entries is 400 KB.
REVOCATIONS_MAX = 10_000
CRL_BYTES_MAX = 1024 * 1024

_NO_SERIALS: frozenset[int] = frozenset()


class Revocations:
    """What this program knows to be revoked; until it has asked the store once, `is_known` is False."""

    def __init__(self) -> None:
        self.is_known = False
        self._serials = _NO_SERIALS
        self._bars: Mapping[HostId, int] = MappingProxyType({})
        self._listeners: list[Callable[[], None]] = []

    def replace(self, serials: frozenset[int], bars: Mapping[HostId, int]) -> None:
        """From now on these serials are refused, and of each host in `bars` what was issued before its moment, in ms of 1970."""
        self._serials, self._bars = serials, bars
        self.is_known = True
        for listener in self._listeners:
            listener()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change; it must return at once."""
        self._listeners.append(listener)

    def is_revoked(self, certificate: bytes) -> bool:
        """Whether a PEM certificate that TLS has verified is refused."""
        serial, identity, issued_ms = _facts(certificate)
        if serial in self._serials:
            return True
        if identity is None or identity.role is not Role.HOST:
            return False
        return issued_ms < self._bars.get(HostId(identity.name), 0)


def serial_of(certificate: bytes) -> str:
    """The serial of a PEM certificate in hex, as the store's keys have it."""
    return f"{_facts(certificate)[0]:x}"


def revoked() -> NotPermittedError:
    """The error of whoever comes with a revoked certificate."""
    message = "this certificate was revoked"
    return NotPermittedError("certificate_revoked", message, "ask an operator for a new one")


def make_list(authority: KeyPair, revoked: Mapping[int, datetime.datetime], now: datetime.datetime) -> bytes:
    """The signed list of `revoked` serials with the moment of each, PEM. It never goes stale: a newer one takes its place."""
    key = serialization.load_pem_private_key(authority.key, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate(authority.certificate).subject
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer)
    builder = builder.last_update(now - BACKDATE).next_update(now + datetime.timedelta(days=CA_DAYS))
    for serial, at in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_list(content: bytes, ca: bytes) -> dict[int, datetime.datetime]:
    """The serials in a list with the moment of each.

    Raises InvalidSpecError `crl_invalid` when it is damaged, past REVOCATIONS_MAX entries, or not signed by the authority `ca`.
    """
    if len(content) > CRL_BYTES_MAX:
        raise _invalid(f"it is past {CRL_BYTES_MAX} bytes")
    try:
        found = x509.load_pem_x509_crl(content)
        key = x509.load_pem_x509_certificate(ca).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        is_signed = found.is_signature_valid(key)
    except UNREADABLE as error:
        raise _invalid("it is no list in PEM form") from error
    if not is_signed:
        raise _invalid("another authority has signed it")
    if len(found) > REVOCATIONS_MAX:
        raise _invalid(f"it has more than {REVOCATIONS_MAX} entries")
    return {entry.serial_number: entry.revocation_date_utc for entry in found}


@functools.lru_cache(maxsize=1024)
def _facts(certificate: bytes) -> tuple[int, Identity | None, int]:
    """Serial, identity and moment of issue of a certificate."""
    parsed = x509.load_pem_x509_certificate(certificate)
    issued_ms = int((parsed.not_valid_before_utc + BACKDATE).timestamp() * 1000)
    try:
        return parsed.serial_number, parse_identity(certificate), issued_ms
    except NotPermittedError:
        return parsed.serial_number, None, issued_ms


def _invalid(message: str) -> InvalidSpecError:
    return InvalidSpecError("crl_invalid", message, "make it with mb pki revoke", field="crl")
