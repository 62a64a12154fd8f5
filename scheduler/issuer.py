"""Signs certificates of hosts, for schedulers that were given the authority's key. Owns that key; knows no store."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from fleet.certificates import LEAF_DAYS
from fleet.enrolment import sign_request
from fleet.errors import InvalidSpecError, NotFoundError
from fleet.identity import Identity, KeyPair, Role, TlsFiles
from fleet.model.enrolment import IssuedCertificate
from fleet.model.ids import HostId

DAYS_MAX = 3650
# Every right of group and others.
OTHERS = 0o077


@dataclass(frozen=True, slots=True)
class EnrolmentConfig:
    """`[enrolment]`: where new hosts ask, and the key that signs for them. `days` is how long a host's certificate lives."""

    listen: str
    ca_key: Path
    days: int = LEAF_DAYS

    def check(self, tls: TlsFiles) -> None:
        """Raises NotFoundError or InvalidSpecError when the key is not that of the authority in `tls`, or `days` is none."""
        if not 1 <= self.days <= DAYS_MAX:
            message = f"{self.days} is not 1 to {DAYS_MAX}"
            raise InvalidSpecError("config_invalid", message, "choose a number within", field="enrolment.days")
        try:
            mode = self.ca_key.stat().st_mode & 0o777
            key = serialization.load_pem_private_key(self.ca_key.read_bytes(), password=None)
        except OSError as error:
            message = f"{self.ca_key}: {error.strerror}"
            next_step = "copy ca.key of mb pki init there, or leave [enrolment] out"
            raise NotFoundError("authority_missing", message, next_step) from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise _unusable(f"{self.ca_key} holds no private key in PEM form") from error
        if mode & OTHERS:
            message = f"others may read {self.ca_key} (mode {mode:o}): whoever does can make any certificate"
            raise InvalidSpecError("config_invalid", message, f"chmod 600 {self.ca_key}", field="enrolment.ca_key")
        if key.public_key() != x509.load_pem_x509_certificate(tls.load()[0]).public_key():
            raise _unusable(f"{self.ca_key} is not the key of {tls.ca}")


@dataclass(frozen=True, slots=True)
class Signed:
    """A certificate in PEM form, and what is noted about it."""

    certificate: bytes
    issued: IssuedCertificate


class Issuer:
    """Signs requests of hosts; the files are read at each signature, so that a new authority needs no restart."""

    def __init__(self, config: EnrolmentConfig, tls: TlsFiles, now: Callable[[], datetime.datetime]) -> None:
        self._config = config
        self._tls = tls
        self._now = now

    @property
    def ca(self) -> bytes:
        """The authority's certificate."""
        return self._tls.load()[0]

    def sign(self, csr: bytes, host_id: HostId) -> Signed:
        """A certificate of that host for the key in `csr`; raises what fleet.enrolment.read_request does."""
        authority = KeyPair(self.ca, self._config.ca_key.read_bytes())
        lifetime, now = datetime.timedelta(days=self._config.days), self._now()
        certificate = sign_request(authority, csr, Identity(Role.HOST, host_id), now, lifetime)
        end_ms = int(certificate.not_valid_after_utc.timestamp() * 1000)
        issued = IssuedCertificate(host_id, f"{certificate.serial_number:x}", int(now.timestamp() * 1000), end_ms)
        return Signed(certificate.public_bytes(serialization.Encoding.PEM), issued)


def _unusable(message: str) -> InvalidSpecError:
    next_step = "name ca.key of the authority that [tls] ca is from"
    return InvalidSpecError("config_invalid", message, next_step, field="enrolment.ca_key")
