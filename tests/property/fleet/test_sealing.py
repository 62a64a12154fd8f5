"""Sealed and locked secrets: opened by the one they are for, and by nobody after any change of a byte."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import InvalidSpecError
from fleet.model.secret import SecretValue
from fleet.sealing import KEY_BYTES, Opener, StoreKey, lock, seal, unlock

VALUES = st.binary(max_size=300)
CONTEXTS = st.text(max_size=20)
OPENER, STRANGER = Opener(), Opener()
KEY, OTHER_KEY = StoreKey(SecretValue(b"k" * KEY_BYTES)), StoreKey(SecretValue(b"o" * KEY_BYTES))


def refused(call: object, *arguments: object) -> str:
    with pytest.raises(InvalidSpecError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.code


@given(VALUES, CONTEXTS)
def test_what_was_sealed_is_opened(value: bytes, context: str) -> None:
    """By its gateway, whatever the value; twice the same is never the same bytes."""
    sealed = seal(OPENER.public_key, SecretValue(value), context)
    assert OPENER.open(sealed, context).reveal() == value
    assert seal(OPENER.public_key, SecretValue(value), context) != sealed
    assert len(value) < 4 or value not in sealed


@given(VALUES, CONTEXTS)
def test_what_was_locked_is_unlocked(value: bytes, context: str) -> None:
    """With the store's key; twice the same is never the same bytes."""
    locked = lock(KEY, SecretValue(value), context)
    assert unlock(KEY, locked, context).reveal() == value
    assert lock(KEY, SecretValue(value), context) != locked
    assert len(value) < 4 or value not in locked


@given(VALUES, st.data())
def test_no_change_goes_unnoticed(value: bytes, data: st.DataObject) -> None:
    """One flipped bit, a cut or an addition anywhere: unreadable, and nothing else is said."""
    sealed, locked = seal(OPENER.public_key, SecretValue(value), "a/b"), lock(KEY, SecretValue(value), "a/b")
    for content, opened, codes in (
        (sealed, lambda one: OPENER.open(one, "a/b"), {"secret_unreadable"}),
        (locked, lambda one: unlock(KEY, one, "a/b"), {"secret_unreadable", "key_unknown"}),
    ):
        place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        for changed in (bytes(flipped), content[:place], content + b"\0", b""):
            assert refused(opened, changed) in codes


@given(VALUES, CONTEXTS, CONTEXTS)
def test_it_opens_in_its_own_place_only(value: bytes, context: str, other: str) -> None:
    """What was written for one tenant, sandbox or name is of no use for another."""
    if context != other:
        assert refused(OPENER.open, seal(OPENER.public_key, SecretValue(value), context), other) == "secret_unreadable"
        assert refused(unlock, KEY, lock(KEY, SecretValue(value), context), other) == "secret_unreadable"


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_without_a_crash(content: bytes) -> None:
    """What comes from the store or a peer is parsed with its limits."""
    assert refused(OPENER.open, content, "a") == "secret_unreadable"
    assert refused(unlock, KEY, content, "a") in ("secret_unreadable", "key_unknown")


def test_another_key_opens_nothing() -> None:
    """A stranger's gateway reads nothing; of a store's key its id is told, so that the operator finds the right one."""
    assert refused(STRANGER.open, seal(OPENER.public_key, SecretValue(b"v"), "a"), "a") == "secret_unreadable"
    locked = lock(KEY, SecretValue(b"v"), "a")
    with pytest.raises(InvalidSpecError) as caught:
        unlock(OTHER_KEY, locked, "a")
    assert caught.value.code == "key_unknown"
    assert KEY.key_id.hex() in caught.value.message
    assert OTHER_KEY.key_id.hex() in caught.value.message


@pytest.mark.parametrize("key", [b"", b"k" * 31, b"k" * 33])
def test_keys_of_another_length_are_refused(key: bytes) -> None:
    """For sealing and for the store, by what to do about it."""
    assert refused(seal, key, SecretValue(b"v"), "a") == "key_invalid"
    assert refused(StoreKey, SecretValue(key)) == "key_invalid"


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)])
def test_a_key_that_makes_every_secret_the_same_is_refused(point: bytes) -> None:
    """Points of small order agree on nothing but zero: nobody seals to them, nobody opens from them."""
    assert refused(seal, point, SecretValue(b"v"), "a") == "key_invalid"
    sealed = seal(OPENER.public_key, SecretValue(b"v"), "a")
    assert refused(OPENER.open, sealed[:1] + point + sealed[33:], "a") == "secret_unreadable"


def test_keys_show_themselves_to_nobody() -> None:
    """Neither repr nor pickle tells a key."""
    assert "kkkk" not in repr(KEY)
    with pytest.raises(TypeError):
        pickle.dumps(KEY)
