"""Whom a TLS client wants to reach: the server name of its ClientHello, read by OpenSSL itself, before anything is answered.

hungry -- bytes --> hungry -- the hello is whole --> done: its name, and every byte so far, to be passed on untouched
hungry -- no hello, too much, an alert --> refused

No parser of our own: what OpenSSL takes for the name is what a server that runs on it will. The handshake ends within the callback,
so no key is made and no certificate needed.
"""

import ssl
from dataclasses import dataclass

from fleet.errors import InvalidSpecError

# A hello of today with post-quantum keys has 2 KiB; one record holds 16 KiB, and a hello has no reason to need a second.
HELLO_BYTES_MAX = 16 * 1024


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client began with: the name as it wrote it (ASCII; empty when it named none), and all that it has sent."""

    server_name: str
    content: bytes


class HelloReader:
    """Reads one connection's hello."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self._session = context.wrap_bio(self._incoming, ssl.MemoryBIO(), server_side=True)
        self._content = bytearray()

    def feed(self, content: bytes) -> Hello | None:
        """The hello once it is whole, None before; raises InvalidSpecError `tls_invalid` for what is none."""
        self._content += content
        if len(self._content) > HELLO_BYTES_MAX:
            raise _invalid(f"its hello has more than {HELLO_BYTES_MAX} bytes")
        self._incoming.write(content)
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as error:
            name = _heard(self._session)
            if name is None:
                raise _invalid(f"this is no TLS hello ({error.reason or 'unknown'})") from error
            return Hello(name, bytes(self._content))
        raise _invalid("it shook hands with nobody")


def make_hello_context() -> ssl.SSLContext:
    """What all readers of a process share: it notes the name at its session, and goes no further."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Whatever the server itself takes: who is reached is asked here, not how well it is encrypted.
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def note(session: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int:
        session.heard_name = name or ""  # type: ignore[attr-defined]
        return ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE

    context.sni_callback = note
    return context


def _heard(session: ssl.SSLObject) -> str | None:
    return getattr(session, "heard_name", None)


def _invalid(message: str) -> InvalidSpecError:
    return InvalidSpecError("tls_invalid", message, "speak TLS 1.2 or later there")
