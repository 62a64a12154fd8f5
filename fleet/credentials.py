"""A program's certificate while it lives: read again when its files change, and replaced on disk so that no crash tears it.

    files change --> the next handshake of a server, the next call of a client --> new credentials; connections that stand stay

A set of files that does not belong together (one of them is written, the other not yet) is passed over until it does.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fleet.certificates import UNREADABLE, certificate_end, is_issued_by
from fleet.errors import BedplateError, HostFaultError
from fleet.identity import KeyPair, TlsFiles

# Files are looked at no more often: three calls of stat, so that a server under load does not make thousands.
LOOK_S = 1.0
KEY_MODE, CERTIFICATE_MODE = 0o600, 0o644

log = structlog.get_logger()

_Stamp = tuple[tuple[int, int, int], ...]


class LiveCredentials:
    """The credentials in `tls` as they are now. `generation` rises when they change."""

    def __init__(self, tls: TlsFiles, clock: Callable[[], float] = time.monotonic) -> None:
        self._tls = tls
        self._clock = clock
        # gRPC asks for a server's certificate on a thread of its own.
        self._lock = threading.Lock()
        self._stamp = _stamp(tls)
        self._loaded = tls.load()
        self._looked_at_s = clock()
        self.generation = 0

    def refresh(self) -> int:
        """Looks at the files, LOOK_S after the last look at the earliest; the generation then."""
        with self._lock:
            if self._clock() - self._looked_at_s >= LOOK_S:
                self._looked_at_s = self._clock()
                self._look()
            return self.generation

    def load(self) -> tuple[bytes, KeyPair]:
        """The authority's certificate and the program's own pair, after a look at the files."""
        self.refresh()
        return self._loaded

    def for_server(self) -> grpc.ServerCredentials:
        """Credentials of a server that asks each client for a certificate of the authority."""
        return self._dynamic(self._mutual, needs_certificate=True)

    def for_open_server(self) -> grpc.ServerCredentials:
        """Credentials of a server that asks for none, and shows the authority's certificate along with its own."""
        return self._dynamic(self._open, needs_certificate=False)

    def _dynamic(
        self, make: Callable[[], grpc.ServerCertificateConfiguration], *, needs_certificate: bool
    ) -> grpc.ServerCredentials:
        seen = self.generation

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal seen
            if self.refresh() == seen:
                return None
            seen = self.generation
            return make()

        # Its stub leaves out that None stands for no change.
        fetcher: Any = fetch
        return grpc.dynamic_ssl_server_credentials(make(), fetcher, require_client_authentication=needs_certificate)

    def _mutual(self) -> grpc.ServerCertificateConfiguration:
        ca, pair = self._loaded
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], root_certificates=ca)

    def _open(self) -> grpc.ServerCertificateConfiguration:
        ca, pair = self._loaded
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate + ca)])

    def _look(self) -> None:
        try:
            stamp = _stamp(self._tls)
            if stamp == self._stamp:
                return
            ca, pair = self._tls.load()
        except (OSError, BedplateError):
            return
        if not _belong_together(ca, pair):
            return
        self._stamp = stamp
        if (ca, pair) != self._loaded:
            self._loaded = (ca, pair)
            self.generation += 1
            log.info(
                "certificate.reloaded",
                file=str(self._tls.certificate),
                ends=certificate_end(pair.certificate).isoformat(),
            )


def install(tls: TlsFiles, pair: KeyPair) -> None:
    """Puts `pair` in place of the certificate and key of `tls`: after a crash at any point `finish_install` ends it.

    Raises HostFaultError `files_unwritable`.
    """
    try:
        write_file(_pending(tls), pair.key + pair.certificate, KEY_MODE)
    except OSError as error:
        raise _unwritable(error) from error
    finish_install(tls)


def finish_install(tls: TlsFiles) -> None:
    """Ends an `install` that a crash cut short; nothing happens when there was none. Raises HostFaultError."""
    pending = _pending(tls)
    try:
        content = pending.read_bytes()
        begin = content.find(b"-----BEGIN CERTIFICATE-----")
        if begin < 0:
            message = f"{pending} is not what an install left behind"
            raise HostFaultError("files_damaged", message, "remove it")
        write_file(tls.key, content[:begin], KEY_MODE)
        write_file(tls.certificate, content[begin:], CERTIFICATE_MODE)
        pending.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(error) from error


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Replaces a file in one step, durably: whoever reads it sees the old content or the new, whole. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)
    aside.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _pending(tls: TlsFiles) -> Path:
    return tls.certificate.with_name(f"{tls.certificate.name}.next")


def _stamp(tls: TlsFiles) -> _Stamp:
    """What tells one content of the files from another without reading them: a replaced file is another inode."""
    found = []
    for path in (tls.ca, tls.certificate, tls.key):
        try:
            status = path.stat()
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def _belong_together(ca: bytes, pair: KeyPair) -> bool:
    try:
        key = serialization.load_pem_private_key(pair.key, password=None)
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        is_ours = key.public_key() == certificate.public_key()
        return is_ours and is_issued_by(certificate, x509.load_pem_x509_certificates(ca))
    except UNREADABLE:
        return False


def _unwritable(error: OSError) -> HostFaultError:
    message = f"{error.filename}: {error.strerror}"
    return HostFaultError("files_unwritable", message, "let this program write there, or name another folder")
