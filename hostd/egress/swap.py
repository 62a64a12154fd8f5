"""Puts secrets into a request's head in place of their placeholders, where their routes say so; finds all others. PURE.

A placeholder that is anywhere else is a leak: the request is refused and recorded. It is worth nothing to whoever gets it, and
who sends it there is mistaken or hostile. Looked at are the head as it is written, its target with percent signs resolved, and what
Basic hides.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote_from_bytes, unquote_to_bytes

from fleet.model.secret import SecretValue

_BASIC = re.compile(rb"(?i)basic[ \t]+([A-Za-z0-9+/=_-]+)[ \t]*")
# RFC 9110: what a header's value cannot hold. A secret with any of these would end its line.
_CONTROL = re.compile(rb"[\0-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head: its method, its target as it was sent (path and query), and its headers in their order."""

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Substitute:
    """One route's placeholder and secret; `headers` (lower case) and `query` say where it may stand in *this* request."""

    name: str
    placeholder: bytes
    secret: SecretValue
    headers: frozenset[bytes] = frozenset()
    query: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Leak:
    """Why a request is refused: which route's placeholder, and where it stood; or that its secret cannot stand there."""

    name: str
    where: str


@dataclass(frozen=True, slots=True)
class Swapped:
    """The head to send, and the routes whose secrets are in it."""

    head: Head
    used: tuple[str, ...]


def swap(head: Head, substitutes: Sequence[Substitute]) -> Swapped | Leak:
    """The head with every secret in its place, or the first leak; `substitutes` are all of the sandbox's, bound here or not."""
    used: list[str] = []
    changed = head
    for one in substitutes:
        if not _stands_in(head, one.placeholder):
            continue
        if _CONTROL.search(one.secret.reveal()):
            return Leak(one.name, "its secret has a control character, for example a newline at its end")
        # Looked for in what the guest sent: a secret that holds a placeholder is no leak of the guest's.
        rest, changed = _take_out(head, one), _put_in(changed, one)
        where = _place_of(rest, one.placeholder)
        if where:
            return Leak(one.name, where)
        used.append(one.name)
    return Swapped(changed, tuple(used))


def _stands_in(head: Head, placeholder: bytes) -> bool:
    return bool(_place_of(head, placeholder))


def _place_of(head: Head, placeholder: bytes) -> str:
    """Where the placeholder stands; empty when it does not."""
    if any(placeholder in form for form in _decodings(head.target)):
        return "the target"
    for name, value in head.headers:
        if placeholder in name:
            return "a header's name"
        if placeholder in value or placeholder in _basic(value) or placeholder in unquote_to_bytes(value):
            return f"the header {name.decode('ascii', 'replace').lower()[:64]}"
    return ""


def _take_out(head: Head, one: Substitute) -> Head:
    """The head without the placeholder where it may be."""
    return _put_in(head, replace(one, secret=SecretValue(b"")))


def _put_in(head: Head, one: Substitute) -> Head:
    headers = tuple(
        (name, _put_into_value(value, one) if name.lower() in one.headers else value) for name, value in head.headers
    )
    return Head(head.method, _put_into_target(head.target, one), headers)


def _put_into_value(value: bytes, one: Substitute) -> bytes:
    credentials = _basic(value)
    if one.placeholder not in credentials:
        return value.replace(one.placeholder, one.secret.reveal())
    return b"Basic " + base64.b64encode(credentials.replace(one.placeholder, one.secret.reveal()))


def _put_into_target(target: bytes, one: Substitute) -> bytes:
    path, mark, query = target.partition(b"?")
    if not mark or not one.query:
        return target
    return path + mark + b"&".join(_put_into_parameter(part, one) for part in query.split(b"&"))


def _put_into_parameter(part: bytes, one: Substitute) -> bytes:
    name, equals, value = part.partition(b"=")
    if unquote_to_bytes(name) not in one.query:
        return part
    plain = unquote_to_bytes(value)
    if one.placeholder not in plain:
        return part
    return name + equals + quote_from_bytes(plain.replace(one.placeholder, one.secret.reveal()), safe="").encode()


def _basic(value: bytes) -> bytes:
    """What HTTP's Basic scheme says in base64 (RFC 7617); empty for any other value."""
    match = _BASIC.fullmatch(value)
    if match is None:
        return b""
    text = match.group(1).replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        return b""


def _decodings(target: bytes) -> Iterable[bytes]:
    """As it is written, and read once and twice, for servers that do."""
    once = unquote_to_bytes(target)
    return target, once, unquote_to_bytes(once)
