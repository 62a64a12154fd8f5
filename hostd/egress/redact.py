"""Takes secrets out of what a server answers, as it streams by. PURE.

Held back is only what may be the beginning of a secret, and never more than the longest has bytes, less one.
"""

from collections.abc import Iterable

# Shorter ones occur by chance, and cutting those out would only spoil answers: a secret so short is none.
REDACTED_BYTES_MIN = 8
REDACTED = b"[redacted]"


class Redactor:
    """One direction of one stream; `secrets` are the forms that must not pass, each of REDACTED_BYTES_MIN bytes at least."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        # The longest first: where one begins another, the whole of it goes.
        self._secrets = sorted(
            {one for one in secrets if len(one) >= REDACTED_BYTES_MIN}, key=lambda one: (-len(one), one)
        )
        self._held = b""
        self.found = 0

    def feed(self, content: bytes) -> bytes:
        """What of the stream may pass now."""
        if not self._secrets:
            return content
        return self._pass_on(self._held + content, is_end=False)

    def end(self) -> bytes:
        """The rest, when nothing follows."""
        return self._pass_on(self._held, is_end=True)

    def _pass_on(self, content: bytes, *, is_end: bool) -> bytes:
        passed = []
        at = 0
        while (found := self._first(content, at)) is not None:
            start, secret = found
            # One that begins there or earlier, and is longer than what is here so far, may yet be the one to take.
            if not is_end and self._begun(content, at) <= start:
                break
            passed += [content[at:start], REDACTED]
            at = start + len(secret)
            self.found += 1
        keep = len(content) if is_end else self._begun(content, at)
        self._held = content[keep:]
        return b"".join((*passed, content[at:keep]))

    def _first(self, content: bytes, at: int) -> tuple[int, bytes] | None:
        """The earliest secret from `at` on, the longest of those that begin there."""
        places = [(place, secret) for secret in self._secrets if (place := content.find(secret, at)) >= 0]
        return min(places, key=lambda one: (one[0], -len(one[1]))) if places else None

    def _begun(self, content: bytes, at: int) -> int:
        """The first place from `at` on from which all that is there begins a secret; the end of `content` without one."""
        return min((_begin_of(secret, content, at) for secret in self._secrets), default=len(content))


def _begin_of(secret: bytes, content: bytes, at: int) -> int:
    place = content.find(secret[:1], max(at, len(content) - len(secret) + 1))
    while place >= 0 and not secret.startswith(content[place:]):
        place = content.find(secret[:1], place + 1)
    return place if place >= 0 else len(content)
