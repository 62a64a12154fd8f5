"""The certificates of an embedded fleet, made fresh for each: they are good for one run and end with its folder."""

import datetime
from pathlib import Path

from fleet.certificates import create_authority, issue_certificate
from fleet.identity import Identity, KeyPair, Role, TlsFiles
from fleet.revocation import make_list

EMBEDDED_TENANT = "demo"
EMBEDDED_HOST = "local"
# For tests and benchmarks that start another host.
SECOND_HOST = "second"

_IDENTITIES = (
    Identity(Role.OPERATOR, "operator"),
    Identity(Role.TENANT, EMBEDDED_TENANT),
    Identity(Role.TENANT, "other"),
    Identity(Role.SCHEDULER, "scheduler"),
    Identity(Role.HOST, EMBEDDED_HOST),
    Identity(Role.HOST, SECOND_HOST),
    Identity(Role.STORE, "etcd"),
)


def create_pki(folder: Path) -> None:
    """Writes an authority and one certificate for every part of an embedded fleet into `folder`."""
    now = datetime.datetime.now(datetime.UTC)
    folder.mkdir(mode=0o700, parents=True)
    authority = create_authority(now)
    (folder / "ca.crt").write_bytes(authority.certificate)
    (folder / "ca.key").touch(0o600)
    (folder / "ca.key").write_bytes(authority.key)
    (folder / "ca.crl").write_bytes(make_list(authority, {}, now))
    for identity in _IDENTITIES:
        add_certificate(folder, authority, identity, now)


def add_certificate(
    folder: Path, authority: KeyPair, identity: Identity, now: datetime.datetime, address: str = "127.0.0.1"
) -> None:
    """Issues one more certificate, for a program that serves at `address`."""
    pair = issue_certificate(authority, identity, now, (address,))
    files = tls_files(folder, identity.role, identity.name)
    files.certificate.write_bytes(pair.certificate)
    files.key.touch(0o600)
    files.key.write_bytes(pair.key)


def tls_files(folder: Path, role: Role, name: str) -> TlsFiles:
    """Where the certificate of a role and name is."""
    return TlsFiles(folder / "ca.crt", folder / f"{role}-{name}.crt", folder / f"{role}-{name}.key")
