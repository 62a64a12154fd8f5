"""A certificate says who somebody is, in one way, and nothing else counts as one."""

import datetime
import ipaddress
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.certificates import (
    CA_DAYS,
    LEAF_DAYS,
    certificate_end,
    check_files,
    create_authority,
    inspect_files,
    issue_certificate,
    parse_identity,
)
from fleet.errors import InvalidSpecError, NotFoundError, NotPermittedError
from fleet.identity import ETCD_CLIENT_NAME, ETCD_SERVER_NAME, SCHEDULER_SERVER_NAME, Identity, KeyPair, Role, TlsFiles

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
AUTHORITY = create_authority(NOW)


def names_of(certificate: bytes) -> x509.SubjectAlternativeName:
    parsed = x509.load_pem_x509_certificate(certificate)
    return parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


@pytest.mark.parametrize("role", Role)
def test_an_identity_comes_back(role: Role) -> None:
    """Every role, and the longest name."""
    identity = Identity(role, "x" * 63)
    assert parse_identity(issue_certificate(AUTHORITY, identity, NOW).certificate) == identity


DNS_NAMES = {
    Role.OPERATOR: [],
    Role.TENANT: [],
    Role.HOST: ["h1.host.bedplate", ETCD_CLIENT_NAME],
    Role.SCHEDULER: [SCHEDULER_SERVER_NAME, ETCD_CLIENT_NAME],
    Role.STORE: [ETCD_SERVER_NAME, ETCD_CLIENT_NAME],
}


@pytest.mark.parametrize("role", Role)
def test_only_programs_open_the_store(role: Role) -> None:
    """The names a certificate proves follow from its role: a tenant's or an operator's proves none."""
    pair = issue_certificate(AUTHORITY, Identity(role, "h1"), NOW, ("127.0.0.1", "::1"))
    names = names_of(pair.certificate)
    assert names.get_values_for_type(x509.DNSName) == DNS_NAMES[role]
    addresses = [ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")]
    assert names.get_values_for_type(x509.IPAddress) == addresses


@pytest.mark.parametrize("name", ["", "A", "a.b", "a/b", "../a", "a" * 64, "a\n", "*"])
def test_a_name_that_is_none(name: str) -> None:
    """No certificate is issued for it."""
    with pytest.raises(InvalidSpecError) as caught:
        issue_certificate(AUTHORITY, Identity(Role.TENANT, name), NOW)
    assert (caught.value.code, caught.value.field) == ("name_invalid", "name")


def self_signed(*names: x509.GeneralName) -> bytes:
    """A certificate with these names, or without any."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1, NOW, NOW + datetime.timedelta(days=1))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


GOOD = "spiffe://bedplate/tenant/acme"
FALSE = {
    "no certificate": b"",
    "noise": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    "no names": self_signed(),
    "no uri": self_signed(x509.DNSName("acme")),
    "two uris": self_signed(uri(GOOD), uri("spiffe://bedplate/operator/acme")),
    "other domain": self_signed(uri("spiffe://elsewhere/tenant/acme")),
    "other scheme": self_signed(uri("https://bedplate/tenant/acme")),
    "no such role": self_signed(uri("spiffe://bedplate/root/acme")),
    "no name": self_signed(uri("spiffe://bedplate/tenant/")),
    "odd name": self_signed(uri("spiffe://bedplate/tenant/ACME")),
    "deeper": self_signed(uri(GOOD + "/x")),
    "query": self_signed(uri(GOOD + "?a")),
}


@pytest.mark.parametrize("certificate", FALSE.values(), ids=FALSE.keys())
def test_what_is_no_identity(certificate: bytes) -> None:
    """One URI of one form; anything else is nobody."""
    with pytest.raises(NotPermittedError) as caught:
        parse_identity(certificate)
    assert caught.value.code == "no_identity"


def test_the_form_is_the_identity() -> None:
    """The good form in the same wrapping is one: the cases above fail for their names alone."""
    assert parse_identity(self_signed(uri(GOOD))) == Identity(Role.TENANT, "acme")


def test_how_long_certificates_last() -> None:
    """Good on a slow clock, for their days, and no certificate of ours is an authority but the authority."""
    pair = issue_certificate(AUTHORITY, Identity(Role.TENANT, "acme"), NOW)
    assert certificate_end(pair.certificate) == NOW + datetime.timedelta(days=LEAF_DAYS)
    assert certificate_end(AUTHORITY.certificate) == NOW + datetime.timedelta(days=CA_DAYS)
    leaf = x509.load_pem_x509_certificate(pair.certificate)
    assert leaf.not_valid_before_utc < NOW
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    authority = x509.load_pem_x509_certificate(AUTHORITY.certificate)
    leaf.verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Which of the three, and how to get it."""
    for name in ("ca", "crt", "key"):
        files = TlsFiles(tmp_path / "ca", tmp_path / "crt", tmp_path / "key")
        with pytest.raises(NotFoundError, match=str(tmp_path / name)) as caught:
            files.load()
        assert caught.value.code == "certificate_missing"
        (tmp_path / name).write_bytes(b"x")
    assert files.load()[0] == b"x"


def write(folder: Path, name: str, pair: KeyPair) -> TlsFiles:
    """A program's files."""
    files = TlsFiles(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key")
    files.ca.write_bytes(AUTHORITY.certificate)
    files.certificate.write_bytes(pair.certificate)
    files.key.write_bytes(pair.key)
    return files


def test_files_are_checked_before_anything_is_served(tmp_path: Path) -> None:
    """A damaged file, the key of another certificate and the certificate of somebody else are told apart, by field and file."""
    mine, other = Identity(Role.HOST, "rack1-07"), Identity(Role.HOST, "rack1-08")
    files = write(tmp_path, "mine", issue_certificate(AUTHORITY, mine, NOW))
    others = write(tmp_path, "other", issue_certificate(AUTHORITY, other, NOW))
    damaged = tmp_path / "damaged"
    damaged.write_text("-----BEGIN CERTIFICATE-----\n")
    check_files(files, mine, NOW)
    for changed, field in (
        (replace(files, ca=damaged), "tls.ca"),
        (replace(files, certificate=damaged), "tls.certificate"),
        (replace(files, key=damaged), "tls.key"),
        (replace(files, key=others.key), "tls.key"),
        (others, "tls.certificate"),
    ):
        with pytest.raises(InvalidSpecError) as caught:
            check_files(changed, mine, NOW)
        assert (caught.value.code, caught.value.field) == ("certificate_unusable", field)
        assert "mb pki issue" in caught.value.next_step
    with pytest.raises(NotFoundError, match="gone"):
        check_files(replace(files, key=tmp_path / "gone"), mine, NOW)


CLOCKS = {
    "certificate_expired": NOW + datetime.timedelta(days=LEAF_DAYS, seconds=1),
    "certificate_early": NOW - datetime.timedelta(hours=1),
}


@pytest.mark.parametrize(("code", "now"), CLOCKS.items(), ids=CLOCKS.keys())
def test_a_certificate_outside_its_time(tmp_path: Path, code: str, now: datetime.datetime) -> None:
    """Past its end, or before its begin by this machine's clock, a certificate is refused at start with the moment named."""
    mine = Identity(Role.HOST, "rack1-07")
    files = write(tmp_path, "mine", issue_certificate(AUTHORITY, mine, NOW))
    assert inspect_files(files, NOW) == mine
    with pytest.raises(InvalidSpecError) as caught:
        check_files(files, mine, now)
    assert (caught.value.code, caught.value.field) == (code, "tls.certificate")
    assert "UTC" in caught.value.message
    assert caught.value.next_step


def test_a_certificate_of_another_fleet(tmp_path: Path) -> None:
    """It is told before a connection fails on it; an authority file that holds both authorities takes both."""
    mine, foreign = Identity(Role.HOST, "rack1-07"), create_authority(NOW)
    files = write(tmp_path, "mine", issue_certificate(foreign, mine, NOW))
    with pytest.raises(InvalidSpecError) as caught:
        check_files(files, mine, NOW)
    assert caught.value.code == "certificate_foreign"
    files.ca.write_bytes(AUTHORITY.certificate + foreign.certificate)
    check_files(files, mine, NOW)


def test_a_certificate_ends_with_its_authority() -> None:
    """However long it was asked for: a chain is good as long as its shortest part."""
    pair = issue_certificate(AUTHORITY, Identity(Role.TENANT, "acme"), NOW, (), datetime.timedelta(days=2 * CA_DAYS))
    assert certificate_end(pair.certificate) == certificate_end(AUTHORITY.certificate)
    short = issue_certificate(AUTHORITY, Identity(Role.TENANT, "acme"), NOW, (), datetime.timedelta(hours=1))
    assert certificate_end(short.certificate) == NOW + datetime.timedelta(hours=1)
