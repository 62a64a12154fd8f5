"""Certificates: made by the authority, read from whoever shows one, and checked where a program starts. Knows no connection.

What a certificate says is fleet.identity's. The two are apart because this one needs `cryptography`, which takes long to import and
which a client that only makes calls does without.
"""

import datetime
import functools
import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet.errors import InvalidSpecError, NotPermittedError
from fleet.identity import (
    ETCD_CLIENT_NAME,
    ETCD_SERVER_NAME,
    SCHEDULER_SERVER_NAME,
    TRUST_DOMAIN,
    Identity,
    KeyPair,
    Role,
    TlsFiles,
    host_server_name,
    identity_uri,
)
from fleet.model.ids import HostId, is_dns_label

T = TypeVar("T")

# All that `cryptography` raises for bytes that are no certificate, request or list: they have no common base.
UNREADABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)

CA_DAYS = 3650
LEAF_DAYS = 365
LEAF_LIFETIME = datetime.timedelta(days=LEAF_DAYS)
# Clocks of a fleet differ by minutes before anyone notices; a certificate must be good on the slowest of them.
BACKDATE = datetime.timedelta(minutes=10)


def check_files(files: TlsFiles, identity: Identity, now: datetime.datetime) -> None:
    """Raises what `inspect_files` does, and InvalidSpecError when the certificate is another's."""
    found = inspect_files(files, now)
    if found != identity:
        message = f"{files.certificate} is for {found.role} {found.name}, not for {identity.role} {identity.name}"
        raise _unusable("tls.certificate", message)


def inspect_files(files: TlsFiles, now: datetime.datetime) -> Identity:
    """Whose files these are, when they are whole, belong together and are good at `now`.

    Raises NotFoundError naming a missing file, or InvalidSpecError: `certificate_unusable` for a damaged file or another's
    key, `certificate_foreign` for another authority's, `certificate_expired` and `certificate_early` by the clock.
    """
    ca, pair = files.load()
    authorities = _read("tls.ca", files.ca, lambda: x509.load_pem_x509_certificates(ca))
    certificate = _read("tls.certificate", files.certificate, lambda: x509.load_pem_x509_certificate(pair.certificate))
    key = _read("tls.key", files.key, lambda: serialization.load_pem_private_key(pair.key, password=None))
    if key.public_key() != certificate.public_key():
        raise _unusable("tls.key", f"{files.key} is not the key of {files.certificate}")
    if not is_issued_by(certificate, authorities):
        message = f"{files.certificate} was not issued by the authority in {files.ca}"
        raise _refused("certificate_foreign", message, "use the ca.crt and the certificate of one fleet")
    ends, begins = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    if now > ends:
        message = f"{files.certificate} ended at {ends:%Y-%m-%d %H:%M} UTC"
        raise _refused("certificate_expired", message, "have a new one issued: mb pki issue, or mb host enrol")
    if now < begins:
        message = f"{files.certificate} is good from {begins:%Y-%m-%d %H:%M} UTC on only"
        raise _refused("certificate_early", message, "set this machine's clock")
    return parse_identity(pair.certificate)


def create_authority(now: datetime.datetime) -> KeyPair:
    """A new self-signed authority, good for CA_DAYS from `now`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Bedplate authority")])
    builder = _certificate(name, name, key.public_key(), (now - BACKDATE, now + datetime.timedelta(days=CA_DAYS)))
    usage = _key_usage(is_authority=True)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    # Authorities have one name: where two are trusted, it is by their keys that a chain finds its own.
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    certificate = builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())
    return KeyPair(certificate.public_bytes(serialization.Encoding.PEM), key_to_pem(key))


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as a file holds it, without a passphrase."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def issue_certificate(
    authority: KeyPair,
    identity: Identity,
    now: datetime.datetime,
    addresses: Sequence[str] = (),
    lifetime: datetime.timedelta = LEAF_LIFETIME,
) -> KeyPair:
    """A certificate and its key for `identity`, as `certify` makes them."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify(authority, identity, key.public_key(), now, addresses=addresses, lifetime=lifetime)
    return KeyPair(certificate.public_bytes(serialization.Encoding.PEM), key_to_pem(key))


def certify(
    authority: KeyPair,
    identity: Identity,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    *,
    addresses: Sequence[str] = (),
    lifetime: datetime.timedelta = LEAF_LIFETIME,
) -> x509.Certificate:
    """A certificate of `identity` for `key`, with the DNS names its role needs and the IP `addresses` it serves on.

    It ends with its authority at the latest. Raises InvalidSpecError when the identity's name is no DNS label.
    """
    if not is_dns_label(identity.name):
        message = f"{identity.name!r} is not 1 to 63 characters of a-z, 0-9 and -"
        raise InvalidSpecError("name_invalid", message, "choose such a name", field="name")
    ca_key = serialization.load_pem_private_key(authority.key, password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{identity.role}:{identity.name}"[:64])])
    end = min(now + lifetime, issuer.not_valid_after_utc)
    builder = _certificate(subject, issuer.subject, key, (now - BACKDATE, end))
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(is_authority=False), critical=True)
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = builder.add_extension(signer, critical=False)
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    names = x509.SubjectAlternativeName(_alternative_names(identity, addresses))
    return builder.add_extension(names, critical=False).sign(ca_key, hashes.SHA256())


@functools.lru_cache(maxsize=1024)
def parse_identity(certificate: bytes) -> Identity:
    """The identity in a PEM certificate that TLS has verified; raises NotPermittedError when it carries none."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate)
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return _parse_uri(uri)
    except UNREADABLE as error:
        message = "the certificate carries no Bedplate identity"
        raise NotPermittedError("no_identity", message, "have one issued with `mb pki issue`") from error


def is_issued_by(certificate: x509.Certificate, authorities: Sequence[x509.Certificate]) -> bool:
    """Whether one of `authorities` has signed a certificate."""
    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except UNREADABLE:
            continue
        return True
    return False


def certificate_end(certificate: bytes) -> datetime.datetime:
    """When a PEM certificate ends, in UTC."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def _parse_uri(uri: str) -> Identity:
    scheme, _, domain, role, name = uri.split("/")
    if (scheme, domain) != ("spiffe:", TRUST_DOMAIN) or not is_dns_label(name):
        raise ValueError(uri)
    return Identity(Role(role), name)


def certificate_span(certificate: bytes) -> tuple[datetime.datetime, datetime.datetime]:
    """When a PEM certificate of ours was issued, and when it ends, in UTC."""
    parsed = x509.load_pem_x509_certificate(certificate)
    return parsed.not_valid_before_utc + BACKDATE, parsed.not_valid_after_utc


def _alternative_names(identity: Identity, addresses: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity_uri(identity))]
    dns_names = {
        Role.SCHEDULER: (SCHEDULER_SERVER_NAME, ETCD_CLIENT_NAME),
        Role.HOST: (host_server_name(HostId(identity.name)), ETCD_CLIENT_NAME),
        Role.STORE: (ETCD_SERVER_NAME, ETCD_CLIENT_NAME),
    }
    names += [x509.DNSName(name) for name in dns_names.get(identity.role, ())]
    return names + [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    span: tuple[datetime.datetime, datetime.datetime],
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(span[0])
        .not_valid_after(span[1])
    )


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _read(field: str, path: Path, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except UNREADABLE as error:
        raise _unusable(field, f"{path} is damaged or not in PEM form") from error


def _unusable(field: str, message: str) -> InvalidSpecError:
    next_step = "copy the files that `mb pki issue` made for this program"
    return InvalidSpecError("certificate_unusable", message, next_step, field=field)


def _refused(code: str, message: str, next_step: str) -> InvalidSpecError:
    return InvalidSpecError(code, message, next_step, field="tls.certificate")
