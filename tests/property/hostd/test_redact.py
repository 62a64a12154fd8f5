"""Redaction of a stream: however it is cut into chunks, no secret passes, all else does, and little is held back."""

from hypothesis import given
from hypothesis import strategies as st

from hostd.egress.redact import REDACTED, REDACTED_BYTES_MIN, Redactor

# Few letters, so that secrets repeat, overlap and begin in each other.
SECRETS = st.lists(st.text("ab", min_size=REDACTED_BYTES_MIN, max_size=14).map(str.encode), min_size=1, max_size=3)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """Secrets, and chunks of a stream with some of them in it."""
    secrets = draw(SECRETS)
    parts = draw(st.lists(st.one_of(st.sampled_from(secrets), st.text("ab.", max_size=20).map(str.encode)), max_size=8))
    whole = b"".join(parts)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return secrets, [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def redact(secrets: list[bytes], chunks: list[bytes]) -> tuple[bytes, int]:
    redactor = Redactor(secrets)
    passed = b"".join([redactor.feed(chunk) for chunk in chunks]) + redactor.end()
    return passed, redactor.found


def redact_whole(secrets: list[bytes], content: bytes) -> tuple[bytes, int]:
    """The same by the simplest means: at each place the longest secret, if one is there."""
    passed, found, at = b"", 0, 0
    while at < len(content):
        here = max((secret for secret in secrets if content.startswith(secret, at)), key=len, default=b"")
        passed, found = passed + (REDACTED if here else content[at : at + 1]), found + bool(here)
        at += len(here) or 1
    return passed, found


@given(streams())
def test_chunks_make_no_difference(stream: tuple[list[bytes], list[bytes]]) -> None:
    """Whatever the cuts: as if all had been there at once."""
    secrets, chunks = stream
    assert redact(secrets, chunks) == redact_whole(secrets, b"".join(chunks))


@given(streams())
def test_no_secret_passes_and_little_is_held(stream: tuple[list[bytes], list[bytes]]) -> None:
    """At every moment, less than the longest secret is held back, and what passed holds none."""
    secrets, chunks = stream
    redactor, longest = Redactor(secrets), max(map(len, secrets))
    taken, passed = 0, b""
    for chunk in chunks:
        taken, passed = taken + len(chunk), passed + redactor.feed(chunk)
        assert taken - longest < len(passed) + redactor.found * longest
        assert not any(secret in part for secret in secrets for part in passed.split(REDACTED))
    assert not any(secret in part for secret in secrets for part in (passed + redactor.end()).split(REDACTED))


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_without_secrets_nothing_waits(chunks: list[bytes]) -> None:
    """A stream that has none to lose passes as it comes; what is too short is no secret."""
    redactor = Redactor([b"short"])
    assert [redactor.feed(chunk) for chunk in chunks] == chunks
    assert redactor.end() == b""
