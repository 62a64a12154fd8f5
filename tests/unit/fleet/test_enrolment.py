"""Tokens and requests for certificates: nothing but the right ones gets through, and no secret is shown."""

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fleet.certificates import BACKDATE, create_authority, parse_identity
from fleet.enrolment import (
    CSR_BYTES_MAX,
    fingerprint,
    hash_secret,
    is_secret,
    is_token_id,
    make_request,
    make_token,
    parse_token,
    read_request,
    sign_request,
)
from fleet.errors import InvalidSpecError, NotPermittedError
from fleet.identity import Identity, Role, identity_uri
from fleet.model.ids import HostId

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
AUTHORITY = create_authority(NOW)
MINE = Identity(Role.HOST, "rack1-07")
PEM = serialization.Encoding.PEM


@pytest.mark.parametrize("host_id", ["a", "rack1-07", "x" * 63])
def test_a_token_comes_back(host_id: str) -> None:
    """Its text is the token, white space around it aside; it names its host and the authority, and hides its secret."""
    token = make_token(HostId(host_id), AUTHORITY.certificate)
    assert parse_token(f"\n {token.render()}\n") == token
    assert (token.host_id, token.ca_sha256) == (host_id, fingerprint(AUTHORITY.certificate))
    assert is_token_id(token.token_id)
    assert is_secret(token.secret, hash_secret(token.secret))
    assert token.secret not in repr(token)
    assert make_token(HostId(host_id), AUTHORITY.certificate) != token


GOOD = make_token(HostId("rack1-07"), AUTHORITY.certificate).render()


@pytest.mark.parametrize(
    "text", ["", "a.b.c", GOOD[:-1], GOOD + "0", GOOD.replace(".", "/"), GOOD.upper(), "../" + GOOD, GOOD + "\n" + GOOD]
)
def test_what_is_no_token(text: str) -> None:
    """It is refused, and the message does not repeat it: it may be most of a token."""
    with pytest.raises(InvalidSpecError) as caught:
        parse_token(text)
    assert caught.value.code == "token_invalid"
    assert len(text) < 5 or text not in caught.value.message + caught.value.next_step


@pytest.mark.parametrize("text", ["", "rack1-07", "../x-00000000", "a/b-00000000", "rack1-07-0000000g", "x" * 90])
def test_what_is_no_token_id(text: str) -> None:
    """It never becomes a key of the store."""
    assert not is_token_id(text)


def test_another_secret_is_none() -> None:
    """Not the empty one, not one of odd characters."""
    known = hash_secret("right")
    assert [is_secret(text, known) for text in ("right", "", "wrong", "\udcff")] == [True, False, False, False]


def test_a_request_becomes_a_certificate() -> None:
    """Of the identity that is asked for, for the key that asked, for as long as was said."""
    key, csr = make_request(MINE)
    certificate = sign_request(AUTHORITY, csr, MINE, NOW, datetime.timedelta(days=30))
    assert parse_identity(certificate.public_bytes(PEM)) == MINE
    assert certificate.public_key() == serialization.load_pem_private_key(key, None).public_key()
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == datetime.timedelta(days=30) + BACKDATE
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(AUTHORITY.certificate))


@pytest.mark.parametrize(
    "other", [Identity(Role.HOST, "rack1-08"), Identity(Role.OPERATOR, "rack1-07"), Identity(Role.SCHEDULER, "x")]
)
def test_a_request_for_somebody_else(other: Identity) -> None:
    """Another host and another role are refused by the name that was asked for."""
    with pytest.raises(NotPermittedError) as caught:
        read_request(make_request(other)[1], MINE)
    assert caught.value.code == "identity_mismatch"
    assert other.name in caught.value.message


def request_with(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *names: x509.GeneralName) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM)


URI = x509.UniformResourceIdentifier(identity_uri(MINE))
KEY = ec.generate_private_key(ec.SECP256R1())


def forged() -> bytes:
    """A request whose signature is not its key's."""
    der = bytearray(x509.load_pem_x509_csr(make_request(MINE)[1]).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(PEM)


FALSE = {
    "nothing": b"",
    "noise": b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    "no names": request_with(KEY),
    "two names": request_with(KEY, URI, x509.UniformResourceIdentifier("spiffe://bedplate/operator/x")),
    "another curve": request_with(ec.generate_private_key(ec.SECP384R1()), URI),
    "rsa": request_with(rsa.generate_private_key(65537, 2048), URI),
    "forged": forged(),
    "endless": make_request(MINE)[1] + b"\n" * CSR_BYTES_MAX,
}


@pytest.mark.parametrize("csr", FALSE.values(), ids=FALSE.keys())
def test_what_is_no_request(csr: bytes) -> None:
    """Damage, other keys, several names and a signature that is another's are the sender's error, by field."""
    with pytest.raises(InvalidSpecError) as caught:
        read_request(csr, MINE)
    assert (caught.value.code, caught.value.field) == ("csr_invalid", "csr")


def test_what_is_asked_for_besides_is_not_given() -> None:
    """Names and rights in a request beyond its identity do not reach the certificate: they are the issuer's to give."""
    csr = request_with(KEY, URI, x509.DNSName("scheduler.bedplate"))
    certificate = sign_request(AUTHORITY, csr, MINE, NOW, datetime.timedelta(days=1))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "scheduler.bedplate" not in names.get_values_for_type(x509.DNSName)
