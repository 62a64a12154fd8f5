"""Lists of revoked certificates, and what follows from one."""

import datetime

import pytest
from cryptography import x509

from fleet.certificates import create_authority, issue_certificate
from fleet.codec import encode
from fleet.errors import InvalidSpecError
from fleet.identity import Identity, KeyPair, Role
from fleet.model.enrolment import HostBar
from fleet.model.ids import HostId
from fleet.revocation import CRL_BYTES_MAX, Revocations, make_list, read_list
from fleet.store.keyspace import barred_key, revoked_key
from fleet.store.port import KeyValue
from fleet.store.revoked import read_revocations

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
LATER = NOW + datetime.timedelta(minutes=1)
AUTHORITY = create_authority(NOW)
HOST = HostId("rack1-07")


def issued(role: Role = Role.HOST, at: datetime.datetime = NOW, name: str = HOST) -> KeyPair:
    return issue_certificate(AUTHORITY, Identity(role, name), at)


def serial_of(pair: KeyPair) -> int:
    return x509.load_pem_x509_certificate(pair.certificate).serial_number


def ms(moment: datetime.datetime) -> int:
    return int(moment.timestamp() * 1000)


def test_a_list_comes_back() -> None:
    """Every serial with its moment, none, and the longest serial."""
    for revoked in ({}, {1: NOW}, {2**159 - 1: NOW, 7: LATER}):
        assert read_list(make_list(AUTHORITY, revoked, LATER), AUTHORITY.certificate) == revoked


FALSE = {
    "nothing": b"",
    "noise": b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
    "another authority's": make_list(create_authority(NOW), {1: NOW}, NOW),
    "endless": make_list(AUTHORITY, {1: NOW}, NOW) + b"\n" * CRL_BYTES_MAX,
}


@pytest.mark.parametrize("content", FALSE.values(), ids=FALSE.keys())
def test_what_is_no_list(content: bytes) -> None:
    """Damage and another authority's signature: nobody is locked out by a list that is not ours."""
    with pytest.raises(InvalidSpecError) as caught:
        read_list(content, AUTHORITY.certificate)
    assert (caught.value.code, caught.value.field) == ("crl_invalid", "crl")


def test_a_serial_is_refused() -> None:
    """That certificate alone, of whatever role, and its listeners are told."""
    revocations, told = Revocations(), []
    revocations.on_change(lambda: told.append(True))
    bad, good = issued(Role.OPERATOR), issued(Role.OPERATOR)
    assert not revocations.is_revoked(bad.certificate)
    revocations.replace(frozenset([serial_of(bad)]), {})
    assert told == [True]
    assert revocations.is_revoked(bad.certificate)
    assert not revocations.is_revoked(good.certificate)


def test_a_bar_refuses_what_was_issued_before() -> None:
    """All of that host's certificates, whoever issued them; not a later one, not another host's, not a tenant of that name."""
    revocations = Revocations()
    revocations.replace(frozenset(), {HOST: ms(LATER)})
    assert revocations.is_revoked(issued().certificate)
    assert not revocations.is_revoked(issued(at=LATER).certificate)
    assert not revocations.is_revoked(issued(name="rack1-08").certificate)
    assert not revocations.is_revoked(issued(Role.TENANT).certificate)


def entry(key: str, value: bytes = b"") -> KeyValue:
    return KeyValue(key, value, 1, 1)


def test_what_the_store_says() -> None:
    """The key is what counts; a bar that cannot be read bars for ever, a key that is no serial is passed over."""
    serials, bars = read_revocations(
        [
            entry(revoked_key("ff")),
            entry(revoked_key("no-serial")),
            entry(barred_key(HOST), encode(HostBar(HOST, 5, "ops"))),
            entry(barred_key(HostId("odd")), b"\xff"),
        ]
    )
    assert serials == {255}
    assert bars[HOST] == 5
    assert bars[HostId("odd")] > ms(NOW + datetime.timedelta(days=36_500))
