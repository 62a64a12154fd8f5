"""How a host comes to its certificate, and loses it: what the store keeps of tokens, certificates and their withdrawal."""

from dataclasses import dataclass

from fleet.model.ids import HostId


@dataclass(frozen=True, slots=True)
class EnrolmentToken:
    """A token that lets one machine join as `host_id`, once: a hash of its secret, and the certificate it was spent for."""

    token_id: str
    host_id: HostId
    secret_sha256: str
    by: str
    created_at_ms: int
    expires_at_ms: int
    certificate: str = ""


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A certificate that a scheduler has signed; `serial` in hex."""

    host_id: HostId
    serial: str
    at_ms: int
    ends_at_ms: int


@dataclass(frozen=True, slots=True)
class Revocation:
    """A certificate that is refused before its end; `serial` in hex."""

    serial: str
    by: str
    at_ms: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class HostBar:
    """Every certificate of a host that was issued before `before_ms` is refused; one issued later lets it in again."""

    host_id: HostId
    before_ms: int
    by: str
    reason: str = ""
