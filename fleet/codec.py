"""Maps the fleet's dataclasses to their protobuf messages and back, by name.

A dataclass and its message have the same name and the same fields; `tests/unit/fleet/test_codec.py` holds the two together.
Enums map by member name (`Phase.TIMED_OUT` is `PHASE_TIMED_OUT`), tuples are repeated fields, None is an absent field.
Bytes from etcd or from a peer are untrusted: whatever does not fit raises InvalidSpecError.
"""

import dataclasses
import functools
import types
import typing
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from bedplate.host.v1 import budget_pb2, cycle_pb2, enrolment_pb2, host_pb2, progress_pb2
from bedplate.sandbox.v1 import event_pb2, sandbox_pb2, service_pb2
from fleet.errors import InvalidSpecError

T = TypeVar("T")

_MODULES = (sandbox_pb2, host_pb2, progress_pb2, event_pb2, service_pb2, enrolment_pb2, budget_pb2, cycle_pb2)


def encode(value: object) -> bytes:
    """The canonical bytes of a dataclass of fleet.model."""
    content: bytes = to_message(value).SerializeToString(deterministic=True)
    return content


def decode(kind: type[T], content: bytes) -> T:
    """The dataclass in `content`; raises InvalidSpecError `undecodable` when there is none."""
    message = _message_type(kind.__name__)()
    try:
        message.ParseFromString(content)
    except DecodeError as error:
        raise InvalidSpecError("undecodable", f"these bytes are no {kind.__name__}") from error
    return from_message(kind, message)


def to_message(value: object) -> Any:
    """The protobuf message of a dataclass of fleet.model."""
    message = _message_type(type(value).__name__)()
    for name, shape in _fields(type(value)):  # type: ignore[arg-type]
        _write_field(message, name, shape, getattr(value, name))
    return message


def from_message(kind: type[T], message: Message) -> T:
    """The dataclass that a message stands for; raises InvalidSpecError `unknown_value` for an enum value it does not know."""
    return kind(**{name: _read_field(message, name, shape) for name, shape in _fields(kind)})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, slots=True)
class _Shape:
    """How a field is written: its inner type, and whether it repeats or may be absent."""

    inner: Any
    is_repeated: bool
    is_optional: bool
    is_message: bool
    is_enum: bool


def _write_field(message: Any, name: str, shape: _Shape, value: Any) -> None:
    if value is None:
        return
    if shape.is_repeated:
        encoded = [_encode_one(shape, entry) for entry in value]
        getattr(message, name).extend(encoded)
    elif shape.is_message:
        getattr(message, name).CopyFrom(to_message(value))
    else:
        setattr(message, name, _encode_one(shape, value))


def _encode_one(shape: _Shape, value: Any) -> Any:
    if shape.is_message:
        return to_message(value)
    return _enum_number(type(value), value) if shape.is_enum else value


def _read_field(message: Any, name: str, shape: _Shape) -> Any:
    value = getattr(message, name)
    if shape.is_repeated:
        return tuple(_decode_one(shape, name, entry) for entry in value)
    if shape.is_optional and not message.HasField(name):
        return None
    return _decode_one(shape, name, value)


def _decode_one(shape: _Shape, name: str, value: Any) -> Any:
    if shape.is_message:
        return from_message(shape.inner, value)
    return _enum_member(shape.inner, name, value) if shape.is_enum else value


def _enum_number(kind: type[StrEnum], value: StrEnum) -> int:
    return int(_enum_type(kind.__name__).Value(_enum_prefix(kind) + value.name))


def _enum_member(kind: type[StrEnum], field: str, number: int) -> StrEnum:
    try:
        name: str = _enum_type(kind.__name__).Name(number)
        return kind[name.removeprefix(_enum_prefix(kind))]
    except (ValueError, KeyError) as error:
        message = f"{number} is no {kind.__name__} this version knows"
        raise InvalidSpecError("unknown_value", message, f"set it to one of {', '.join(kind)}", field=field) from error


def _enum_prefix(kind: type[StrEnum]) -> str:
    name = kind.__name__
    return "".join("_" + char if char.isupper() and index else char for index, char in enumerate(name)).upper() + "_"


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, _Shape], ...]:
    hints = typing.get_type_hints(kind)
    return tuple((field.name, _shape(hints[field.name])) for field in dataclasses.fields(kind))


def _shape(hint: Any) -> _Shape:
    is_optional = isinstance(hint, types.UnionType) and types.NoneType in hint.__args__
    if is_optional:
        (hint,) = (part for part in hint.__args__ if part is not types.NoneType)
    is_repeated = typing.get_origin(hint) is tuple
    if is_repeated:
        hint = typing.get_args(hint)[0]
    is_enum = isinstance(hint, type) and issubclass(hint, StrEnum)
    return _Shape(hint, is_repeated, is_optional, dataclasses.is_dataclass(hint), is_enum)


@functools.cache
def _message_type(name: str) -> Any:
    return next(getattr(module, name) for module in _MODULES if hasattr(module, name))


@functools.cache
def _enum_type(name: str) -> Any:
    return _message_type(name)
