"""Only closed patterns become file names, interface names and keys."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.model.ids import Digest, digest_hex, is_digest, is_dns_label, is_sandbox_id, make_sandbox_id

HOSTILE = ["", ".", "..", "a/b", "../etc", "a\0", "a\n", "Ä", "a b", "A", "a.b", "a_b", "-a", "a-", "x" * 64, "٣"]


@given(st.binary(min_size=10, max_size=10))
def test_every_made_id_is_one(random_bytes: bytes) -> None:
    """Sixty random bits are 12 characters; with "bp-" before them they are an interface name."""
    sandbox_id = make_sandbox_id(lambda count: random_bytes[:count])
    assert is_sandbox_id(sandbox_id)
    assert len("bp-" + sandbox_id) == 15


def test_ids_differ() -> None:
    """With real randomness no id comes twice in ten thousand."""
    assert len({make_sandbox_id(secrets.token_bytes) for _ in range(10_000)}) == 10_000


@pytest.mark.parametrize("text", [*HOSTILE, "a" * 11, "a" * 13, "a" * 11 + "1", "a" * 12 + "\n"])
def test_what_is_no_id(text: str) -> None:
    """Length and alphabet are exact, a trailing newline included."""
    assert not is_sandbox_id(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_label(text: str) -> None:
    """Nothing that climbs, splits a key or looks different elsewhere is a name."""
    assert not is_dns_label(text)


@pytest.mark.parametrize("text", ["a", "0", "a-b", "x" * 63, "1-2"])
def test_what_is_a_label(text: str) -> None:
    """RFC 1123's labels in lower case, 1 to 63 characters."""
    assert is_dns_label(text)


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:" + "A" * 64, "sha256:" + "0" * 63, "sha256:" + "0" * 65, "0" * 64]
)
def test_what_is_no_digest(text: str) -> None:
    """A digest is its algorithm and 64 lower-case hex digits."""
    assert not is_digest(text)
    assert not is_digest("sha256:" + "0" * 64 + "\n")


def test_the_hex_of_a_digest() -> None:
    """What file names are made of has no colon."""
    assert digest_hex(Digest("sha256:" + "0a" * 32)) == "0a" * 32
