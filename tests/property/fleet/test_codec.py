"""Whatever the model can say survives the wire, and whatever else the wire says is refused."""

import dataclasses
import types
import typing
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.codec import decode, encode
from fleet.errors import InvalidSpecError
from fleet.model.assignment import Assignment, Sandbox
from fleet.model.host import Host
from fleet.model.sandbox import SandboxRecord, SandboxSpec, SandboxStatus
from hostd.reconcile.progress import Progress

ROOTS = (Assignment, Sandbox, Host, SandboxRecord, SandboxSpec, SandboxStatus, Progress)
# What every integer field of the messages holds, signed or not, 32 bits or 64.
INTEGERS = st.integers(0, 2**31 - 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    int: INTEGERS,
    str: TEXTS,
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Every value that a field of this type may hold."""
    hint = getattr(hint, "__supertype__", hint)
    if isinstance(hint, types.UnionType):
        return st.one_of(st.none(), *(values(part) for part in hint.__args__ if part is not types.NoneType))
    if typing.get_origin(hint) is tuple:
        return st.lists(values(typing.get_args(hint)[0]), max_size=2).map(tuple)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in dataclasses.fields(hint)})
    return st.sampled_from(hint) if issubclass(hint, StrEnum) else PLAIN[hint]


@pytest.mark.parametrize("kind", ROOTS, ids=lambda kind: kind.__name__)
@given(choose=st.data())
def test_a_value_comes_back(kind: type, choose: st.DataObject) -> None:
    """Encoded and decoded it is the same value, and the same bytes again."""
    value = choose.draw(values(kind))
    content = encode(value)
    assert decode(kind, content) == value
    assert encode(decode(kind, content)) == content


@pytest.mark.parametrize("kind", ROOTS, ids=lambda kind: kind.__name__)
@given(content=st.binary(max_size=200))
def test_hostile_bytes_raise_one_error(kind: type, content: bytes) -> None:
    """Bytes from a peer or the store either are a value or InvalidSpecError; nothing else escapes."""
    try:
        value = decode(kind, content)
    except InvalidSpecError:
        return
    assert decode(kind, encode(value)) == value or "nan" in repr(value)


@given(choose=st.data())
def test_a_flipped_byte_raises_one_error(choose: st.DataObject) -> None:
    """The same holds for bytes that were a value before one of them changed."""
    content = bytearray(encode(choose.draw(values(SandboxSpec))))
    index = choose.draw(st.integers(0, len(content) - 1))
    content[index] ^= choose.draw(st.integers(1, 255))
    try:
        decode(SandboxSpec, bytes(content))
    except InvalidSpecError:
        return
