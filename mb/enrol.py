"""Makes this machine a host: a key, a request, a certificate, against a one-time token.

    TLS without trust --> the authority's certificate, whose hash the token has --> TLS under that authority alone --> Enrol

Until the authority has proved itself nothing of the token is sent; its secret goes only over the second connection.
"""

import asyncio
import datetime
import hashlib
import socket
import ssl
import stat
import sys
from pathlib import Path
from typing import Any

import grpc

from bedplate.host.v1 import enrolment_pb2, enrolment_pb2_grpc
from fleet.certificates import check_files
from fleet.credentials import CERTIFICATE_MODE, install, write_file
from fleet.enrolment import JoinToken, make_request, parse_token
from fleet.errors import (
    ConflictError,
    HostFaultError,
    InvalidSpecError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
)
from fleet.identity import SCHEDULER_SERVER_NAME, Identity, KeyPair, Role, TlsFiles
from fleet.rpc import channel_options, translated

HANDSHAKE_S = 10.0
CALL_TIMEOUT_S = 15.0
# The answer may be lost on its way, in a scheduler that is started again: the same request gets the same certificate.
ATTEMPTS_MAX = 10
PAUSE_S = 2.0
TOKEN_BYTES_MAX = 1024
CHAIN_MAX = 8


def read_token(file: str) -> JoinToken:
    """The token in a file, or on stdin for "-"; raises NotFoundError or InvalidSpecError, neither of which quotes it."""
    try:
        if file == "-":
            content = sys.stdin.buffer.read(TOKEN_BYTES_MAX)
        else:
            with Path(file).open("rb") as stream:
                if not stat.S_ISREG(Path(file).stat().st_mode):
                    raise InvalidSpecError(
                        "token_invalid", f"{file} is no file", "name a file, or - for stdin", field="token"
                    )
                content = stream.read(TOKEN_BYTES_MAX)
    except OSError as error:
        message = f"{file}: {error.strerror}"
        raise NotFoundError("token_missing", message, "name the file with what mb host token printed") from error
    return parse_token(content.decode("utf-8", "replace"))


def enrol(token: JoinToken, address: str, out: Path, *, force: bool) -> TlsFiles:
    """Gets a certificate and writes it with its key and the authority's; the files then.

    Raises UnavailableError when the scheduler cannot be reached, NotPermittedError for a token or an authority that is not right,
    ConflictError for files that are there.
    """
    files = TlsFiles(out / "ca.crt", out / "host.crt", out / "host.key")
    _check_folder(files, force=force)
    ca = fetch_authority(address, token.ca_sha256)
    identity = Identity(Role.HOST, token.host_id)
    key, csr = make_request(identity)
    chain = asyncio.run(_ask(token, csr, ca, address))
    try:
        out.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_file(files.ca, ca, CERTIFICATE_MODE)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
        raise HostFaultError("files_unwritable", message, "name another folder with --out") from error
    install(files, KeyPair(chain.certificate, key))
    check_files(files, identity, datetime.datetime.now(datetime.UTC))
    return files


def fetch_authority(address: str, sha256: str) -> bytes:
    """The authority's certificate in the chain that the scheduler shows, PEM; raises NotPermittedError unless its hash is `sha256`.

    The connection is not trusted and nothing is sent over it: what it shows is public, and the hash says whether it is true.
    """
    for shown in _shown_chain(address):
        # Not even parsed before its hash is right: a stranger may have sent it.
        if hashlib.sha256(shown).hexdigest() == sha256:
            return ssl.DER_cert_to_PEM_cert(shown).encode()
    message = f"{address} does not show the authority that the token names"
    next_step = "check the address; a wrong one, or somebody between, would look like this"
    raise NotPermittedError("authority_mismatch", message, next_step)


def _shown_chain(address: str) -> list[bytes]:
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit()):
        message = f"{address!r} is no address"
        raise InvalidSpecError("address_invalid", message, "write ip:port", field="scheduler")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), HANDSHAKE_S) as plain,
            context.wrap_socket(plain, server_hostname=SCHEDULER_SERVER_NAME) as wrapped,
        ):
            return _unverified_chain(wrapped)[:CHAIN_MAX]
    except ssl.SSLError as error:
        message = f"{address} does not speak TLS as a scheduler's enrolment listener does"
        raise UnavailableError("unreachable", message, "use the address of listen in [enrolment]") from error
    except OSError as error:
        message = f"{address} cannot be reached: {error.strerror or error}"
        raise UnavailableError(
            "unreachable", message, "check the address, and that a scheduler with [enrolment] runs"
        ) from error


def _unverified_chain(wrapped: ssl.SSLSocket) -> list[bytes]:
    """Every certificate that the peer has sent, DER. Public since Python 3.13; before that on the object behind it."""
    socket_: Any = wrapped
    if hasattr(socket_, "get_unverified_chain"):
        return list(socket_.get_unverified_chain())
    return [ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in socket_._sslobj.get_unverified_chain() or ()]


async def _ask(token: JoinToken, csr: bytes, ca: bytes, address: str) -> Any:
    request = enrolment_pb2.EnrolRequest(token_id=token.token_id, secret=token.secret, csr=csr)
    options = channel_options(SCHEDULER_SERVER_NAME)
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca), options=options) as channel:
        stub: Any = enrolment_pb2_grpc.JoinServiceStub(channel)
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                with translated(f"scheduler {address}"):
                    return await stub.Enrol(request, timeout=CALL_TIMEOUT_S)
            except UnavailableError as error:
                if attempt == ATTEMPTS_MAX or error.code not in ("unreachable", "deadline_exceeded"):
                    raise
            await asyncio.sleep(PAUSE_S)
    raise AssertionError("unreachable")


def _check_folder(files: TlsFiles, *, force: bool) -> None:
    there = [str(path) for path in (files.ca, files.certificate, files.key) if path.exists()]
    if there and not force:
        message = f"{' and '.join(there)}: there already"
        raise ConflictError("files_exist", message, "name another folder, or --force")
