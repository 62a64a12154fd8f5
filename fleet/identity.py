"""Who is who: one certificate authority, certificates with a role and a name, nothing in plain text.

A certificate carries its identity in a URI name, `spiffe://bedplate/<role>/<name>`. Programs that talk to etcd also carry the
DNS name ETCD_CLIENT_NAME, which etcd is told to demand (`--client-cert-allowed-hostname`): a tenant's certificate, though signed
by the same authority, does not open the store. Source: RFC 5280; the SPIFFE ID form, without its federation.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fleet.errors import NotFoundError
from fleet.model.ids import HostId

TRUST_DOMAIN = "bedplate"
SCHEDULER_SERVER_NAME = "scheduler.bedplate"
ETCD_SERVER_NAME = "etcd.bedplate"
ETCD_CLIENT_NAME = "etcd-client.bedplate"


class Role(StrEnum):
    """What a certificate may do; docs/threat-model.md lists which role may call what."""

    OPERATOR = "operator"
    TENANT = "tenant"
    HOST = "host"
    SCHEDULER = "scheduler"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class Identity:
    """The caller as its certificate says."""

    role: Role
    name: str


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate with its private key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a program finds the authority's certificate, its own, and its key."""

    ca: Path
    certificate: Path
    key: Path

    def load(self) -> tuple[bytes, KeyPair]:
        """The authority's certificate and the program's own pair; raises NotFoundError naming the missing file."""
        return _load_pem(self.ca), KeyPair(_load_pem(self.certificate), _load_pem(self.key))


def host_server_name(host_id: HostId) -> str:
    """The DNS name that a host's hostd proves."""
    return f"{host_id}.host.bedplate"


def identity_uri(identity: Identity) -> str:
    """An identity as a certificate carries it."""
    return f"spiffe://{TRUST_DOMAIN}/{identity.role}/{identity.name}"


def _load_pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{path}: {error.strerror}"
        raise NotFoundError("certificate_missing", message, "have one issued with `mb pki issue`") from error
