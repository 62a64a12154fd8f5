"""What strangers send to the enrolment listener: whatever it is, it is an error with a code, and never another one."""

import base64
import datetime
from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import example, given
from hypothesis import strategies as st

from fleet.certificates import create_authority
from fleet.enrolment import is_token_id, make_request, parse_token, read_request
from fleet.errors import BedplateError
from fleet.identity import Identity, Role
from fleet.revocation import make_list, read_list
from scheduler.api.failures import address_of

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
AUTHORITY = create_authority(NOW)
MINE = Identity(Role.HOST, "rack1-07")
DER, PEM = serialization.Encoding.DER, serialization.Encoding.PEM
CSR = x509.load_pem_x509_csr(make_request(MINE)[1]).public_bytes(DER)
CRL = x509.load_pem_x509_crl(make_list(AUTHORITY, {1: NOW, 2: NOW}, NOW)).public_bytes(DER)


def code_of(call: Callable[[], object]) -> str:
    """The code with which a call is refused; empty when it is not. Any other exception fails the test."""
    try:
        call()
    except BedplateError as error:
        return error.code
    return ""


def to_pem(kind: str, der: bytes) -> bytes:
    """DER as PEM, without asking whether it is any."""
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN {kind}-----\n{text}-----END {kind}-----\n".encode()


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` with some of its bytes changed, doubled or left out."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content) - 1))
        how = draw(st.sampled_from(["change", "insert", "cut"]))
        if how == "change":
            content[place] = draw(st.integers(0, 255))
        elif how == "insert":
            content.insert(place, draw(st.integers(0, 255)))
        else:
            del content[place : place + draw(st.integers(1, 8))]
        if not content:
            break
    return bytes(content)


def version_of(der: bytes, marker: bytes) -> bytes:
    """`der` with another version after the first `marker`."""
    place = der.index(marker) + len(marker)
    return der[:place] + b"\x52" + der[place + 1 :]


@given(damaged(CSR))
@example(version_of(CSR, b"\x02\x01"))
@example(CSR.replace(b"\x86", b"\x83"))
def test_a_damaged_request_is_an_error_with_a_code(der: bytes) -> None:
    """Any change of a request is refused as one: its signature covers all of it."""
    code = code_of(lambda: read_request(to_pem("CERTIFICATE REQUEST", der), MINE))
    assert code in ("csr_invalid", "identity_mismatch") or x509.load_der_x509_csr(der).is_signature_valid


@given(damaged(CRL))
@example(version_of(CRL, b"\x02\x01"))
def test_a_damaged_list_is_an_error_with_a_code(der: bytes) -> None:
    """The same for a list of revoked certificates: what is read of one was signed."""
    content = to_pem("X509 CRL", der)
    if code_of(lambda: read_list(content, AUTHORITY.certificate)) != "crl_invalid":
        assert read_list(content, AUTHORITY.certificate) == {1: NOW, 2: NOW}


@given(st.binary(max_size=300))
@example(b"-----BEGIN CERTIFICATE REQUEST-----")
def test_noise_is_no_request(content: bytes) -> None:
    """Bytes of no form."""
    assert code_of(lambda: read_request(content, MINE)) == "csr_invalid"


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    """As a token, as its id, as a peer's name: an answer or an error, and an id never holds a slash."""
    assert not is_token_id(text) or "/" not in text
    assert "/" not in address_of(text).removesuffix("/64")
    assert code_of(lambda: parse_token(text)) in ("", "token_invalid")
