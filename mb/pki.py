"""A fleet's authority and certificates as files: `ca.crt`, `ca.key`, and NAME.crt with NAME.key for each that is issued."""

import datetime
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fleet.certificates import UNREADABLE, parse_identity
from fleet.credentials import CERTIFICATE_MODE, KEY_MODE, write_file
from fleet.errors import ConflictError, HostFaultError, InvalidSpecError, NotFoundError, NotPermittedError
from fleet.identity import KeyPair
from fleet.revocation import make_list, read_list

AUTHORITY = "ca"
CRL = "ca.crl"

# RFC 5280: at most 20 octets.
_SERIAL = re.compile(r"[0-9a-fA-F]{1,40}")


def load_authority(folder: Path) -> KeyPair:
    """The authority in `folder`; raises NotFoundError `authority_missing`."""
    try:
        return KeyPair((folder / f"{AUTHORITY}.crt").read_bytes(), (folder / f"{AUTHORITY}.key").read_bytes())
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
        raise NotFoundError("authority_missing", message, f"make one with mb pki init {folder}") from error


def check_addresses(addresses: Sequence[str]) -> None:
    """Raises InvalidSpecError `address_invalid` for what is no IP address."""
    for address in addresses:
        try:
            ipaddress.ip_address(address)
        except ValueError as error:
            message = f"{address[:80]!r} is no IP address"
            raise InvalidSpecError("address_invalid", message, "write for example 10.0.0.5", field="address") from error


def check_name(name: str) -> None:
    """Raises InvalidSpecError `name_invalid` for a name whose files would be the authority's own."""
    if name == AUTHORITY:
        raise InvalidSpecError("name_invalid", f"{AUTHORITY} names the authority", "choose another name", field="name")


def write_pair(folder: Path, name: str, pair: KeyPair, *, force: bool) -> tuple[Path, Path]:
    """Writes NAME.crt and NAME.key, the key for its owner's eyes only; raises ConflictError `files_exist` unless forced."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    there = [str(path) for path in (certificate, key) if path.exists()]
    if there and not force:
        raise ConflictError(
            "files_exist",
            f"{' and '.join(there)}: there already",
            "use another name, or --force",
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(key, pair.key, KEY_MODE)
        write_file(certificate, pair.certificate, CERTIFICATE_MODE)
    except OSError as error:
        raise HostFaultError(
            "files_unwritable", f"{error.filename}: {error.strerror}", "name another folder"
        ) from error
    return certificate, key


def parse_serial(text: str) -> int:
    """The serial that `mb pki show` prints; raises InvalidSpecError `serial_invalid`."""
    if _SERIAL.fullmatch(text) is None:
        raise InvalidSpecError(
            "serial_invalid", f"{text[:80]!r} is no serial in hex", "mb pki show prints it", field="serial"
        )
    return int(text, 16)


def serial_in(folder: Path, name: str) -> int:
    """The serial of NAME.crt; raises what describe_certificate does."""
    check_name(name)
    return int(str(describe_certificate(folder / f"{name}.crt")["serial"]), 16)


def revoke(folder: Path, serial: int, now: datetime.datetime) -> int:
    """Adds a serial to the signed list in `folder`, which is made at the first; how many it has then. Safe to repeat."""
    authority = load_authority(folder)
    path = folder / CRL
    known = read_list(path.read_bytes(), authority.certificate) if path.exists() else {}
    listed = {serial: now} | known
    try:
        write_file(path, make_list(authority, listed, now), CERTIFICATE_MODE)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
        raise HostFaultError("files_unwritable", message, "name another folder") from error
    return len(listed)


def load_list(folder: Path) -> bytes:
    """The signed list in `folder`; raises NotFoundError `crl_missing`."""
    try:
        return (folder / CRL).read_bytes()
    except OSError as error:
        message = f"{folder / CRL}: {error.strerror}"
        raise NotFoundError("crl_missing", message, f"mb pki revoke {folder} NAME makes it") from error


def describe_certificate(file: Path) -> dict[str, str | list[str]]:
    """What a PEM certificate says; raises NotFoundError or InvalidSpecError when there is none in `file`."""
    try:
        content = file.read_bytes()
        certificate = x509.load_pem_x509_certificate(content)
    except OSError as error:
        raise NotFoundError("certificate_missing", f"{file}: {error.strerror}", "name a .crt file") from error
    except UNREADABLE as error:
        raise InvalidSpecError("certificate_invalid", f"{file} is no PEM certificate", "name a .crt file") from error
    role, name = _identity(content)
    return {
        "role": role,
        "name": name,
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "from": certificate.not_valid_before_utc.isoformat(),
        "until": certificate.not_valid_after_utc.isoformat(),
        "serves": _served_names(certificate),
        "serial": f"{certificate.serial_number:x}",
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }


def _identity(content: bytes) -> tuple[str, str]:
    try:
        identity = parse_identity(content)
    except NotPermittedError:
        # The authority's own certificate, or a foreign one.
        return "none", "none"
    return identity.role, identity.name


def _served_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]
