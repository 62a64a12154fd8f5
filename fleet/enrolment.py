"""How a machine proves that it may become a host: one-time tokens, and requests for certificates. PURE apart from randomness.

    token = <host_id>-<8 hex digits>.<secret>.<sha256 of the authority's certificate>

The first part is the token's id in the store, the second is known to its holder only (the store has its hash), and by the third the
new host knows the authority before it trusts a word of the scheduler.
"""

import base64
import datetime
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleet.certificates import UNREADABLE, certify, key_to_pem
from fleet.errors import InvalidSpecError, NotPermittedError
from fleet.identity import Identity, KeyPair, identity_uri
from fleet.model.ids import HostId

# 256 random bits: nobody guesses them, however often they are asked.
SECRET_BYTES = 32
# Tells the tokens of one host apart; no secret.
SERIAL_BYTES = 4
# A request with one name and a P-256 key takes 500 bytes.
CSR_BYTES_MAX = 8 * 1024

_TOKEN = re.compile(r"([a-z0-9-]{1,63}-[0-9a-f]{8})\.([A-Za-z0-9_-]{43})\.([0-9a-f]{64})")
_TOKEN_ID = re.compile(r"[a-z0-9-]{1,63}-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What an operator hands to a new host."""

    token_id: str
    secret: str = field(repr=False)
    ca_sha256: str

    @property
    def host_id(self) -> HostId:
        """The host that it is for."""
        return HostId(self.token_id[: -2 * SERIAL_BYTES - 1])

    def render(self) -> str:
        """The token as text."""
        return f"{self.token_id}.{self.secret}.{self.ca_sha256}"


def make_token(host_id: HostId, ca: bytes) -> JoinToken:
    """A new token for a host, under the authority of that certificate."""
    secret = base64.urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).decode().rstrip("=")
    return JoinToken(f"{host_id}-{secrets.token_hex(SERIAL_BYTES)}", secret, fingerprint(ca))


def parse_token(text: str) -> JoinToken:
    """The token in `text`, white space around it aside; raises InvalidSpecError `token_invalid`, which never quotes it."""
    found = _TOKEN.fullmatch(text.strip())
    if found is None:
        message = "this is no token: it is not <id>.<secret>.<sha256>"
        raise InvalidSpecError("token_invalid", message, "copy all of what mb host token printed", field="token")
    return JoinToken(*found.groups())


def is_token_id(text: str) -> bool:
    """Whether `text` may be the id of a token."""
    return _TOKEN_ID.fullmatch(text) is not None


def hash_secret(secret: str) -> str:
    """What the store keeps of a secret: with so many random bits a plain hash tells nothing."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def is_secret(secret: str, secret_sha256: str) -> bool:
    """Whether `secret` is the one behind the hash, in constant time."""
    return hmac.compare_digest(hash_secret(secret), secret_sha256)


def fingerprint(certificate: bytes) -> str:
    """The SHA-256 of a PEM certificate (its first, where there are several) in hex, as openssl prints it without colons."""
    return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()


def make_request(identity: Identity) -> tuple[bytes, bytes]:
    """A new private key and the request for `identity` that it signs, both PEM. The key is for this machine only."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity_uri(identity))])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{identity.role}:{identity.name}"[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
    return key_to_pem(key), request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_request(csr: bytes, identity: Identity) -> ec.EllipticCurvePublicKey:
    """The key in a request for `identity`, which the sender has proved to hold.

    Raises InvalidSpecError `csr_invalid` for what is no request with a P-256 key, NotPermittedError `identity_mismatch` for one of
    another identity.
    """
    if len(csr) > CSR_BYTES_MAX:
        raise _invalid(f"it is past {CSR_BYTES_MAX} bytes")
    try:
        request = x509.load_pem_x509_csr(csr)
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        key = request.public_key()
        is_signed = request.is_signature_valid
    except UNREADABLE as error:
        raise _invalid("it is no request in PEM form with one URI") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _invalid("its key is not on the curve P-256")
    if not is_signed:
        raise _invalid("its signature is not its key's")
    if uri != identity_uri(identity):
        message = f"the request is for {uri[:120]!r}, not for {identity.role} {identity.name}"
        raise NotPermittedError("identity_mismatch", message, "make a request, or a token, for the right host")
    return key


def sign_request(
    authority: KeyPair, csr: bytes, identity: Identity, now: datetime.datetime, lifetime: datetime.timedelta
) -> x509.Certificate:
    """The certificate that `csr` asks for; raises what read_request does."""
    return certify(authority, identity, read_request(csr, identity), now, lifetime=lifetime)


def _invalid(message: str) -> InvalidSpecError:
    return InvalidSpecError("csr_invalid", message, "make it with mb host enrol", field="csr")
