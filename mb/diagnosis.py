"""Why a scheduler cannot be reached, said so that somebody can mend it: gRPC knows one word for a cable and for a certificate.

Looks only after a call has failed: at the certificate's own files, then once at the connection and its handshake.
"""

import datetime
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fleet.errors import BedplateError, InvalidSpecError, NotPermittedError, UnavailableError
from fleet.identity import SCHEDULER_SERVER_NAME
from mb.config import ClientConfig

# A handshake takes a round trip or two; whoever needs longer is in trouble of another kind.
HANDSHAKE_S = 5.0
# A server says at once when it does not take a certificate; silence means that it did.
LISTEN_S = 1.0


@contextmanager
def explained(config: ClientConfig) -> Iterator[None]:
    """Within it, a scheduler that is unreachable raises the reason."""
    try:
        yield
    except UnavailableError as error:
        if error.code != "unreachable":
            raise
        raise explain(config) or error from error


def explain(config: ClientConfig) -> BedplateError | None:
    """The error behind `unreachable`, None when there is no more to say."""
    from fleet.certificates import inspect_files  # noqa: PLC0415 (imports cryptography, and only when a call has failed)

    try:
        inspect_files(config.tls, datetime.datetime.now(datetime.UTC))
    except BedplateError as error:
        return error
    # Each has failed: what is wrong with the first is wrong with all, or worth to be told first.
    return _try_connection(config, config.addresses[0])


def _try_connection(config: ClientConfig, address: str) -> BedplateError | None:
    peer = f"scheduler {address}"
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=config.tls.ca)
    context.load_cert_chain(config.tls.certificate, config.tls.key)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), HANDSHAKE_S) as plain,
            context.wrap_socket(plain, server_hostname=SCHEDULER_SERVER_NAME) as wrapped,
        ):
            wrapped.settimeout(LISTEN_S)
            # gRPC greets whom it takes, and hangs up on others without a word.
            with suppress(TimeoutError):
                return None if wrapped.recv(1) else _refused(config, address, "it hangs up")
            return None
    except ssl.SSLCertVerificationError as error:
        message = f"{peer} is not one of this authority: {error.verify_message}"
        next_step = f"check its address, its certificate, and that {config.tls.ca} is of its fleet"
        return InvalidSpecError("server_untrusted", message, next_step, field="tls.ca")
    except ssl.SSLError as error:
        return _refused(config, address, error.reason or "TLS failed")
    except (ConnectionResetError, BrokenPipeError):
        return _refused(config, address, "it hangs up")
    except OSError as error:
        message = f"{peer} cannot be reached: {error.strerror or error}"
        return UnavailableError("unreachable", message, "check its address and that it runs")


def _refused(config: ClientConfig, address: str, how: str) -> NotPermittedError:
    message = f"scheduler {address} does not take {config.tls.certificate}: {how}"
    return NotPermittedError("certificate_refused", message, "have one issued by its authority: mb pki issue")
