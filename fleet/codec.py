"""Maps the fleet's dataclasses to their protobuf messages and back, by name.

A dataclass and its message have the same name and the same fields; `tests/unit/fleet/test_codec.py` holds the two together.
Enums map by member name (`Phase.TIMED_OUT` is `PHASE_TIMED_OUT`), tuples are repeated fields, None is an absent field.
Bytes from etcd or from a peer are untrusted: whatever does not fit raises InvalidSpecError.
"""

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from bedplate.host.v1 import account_pb2, budget_pb2, cycle_pb2, enrolment_pb2, host_pb2, progress_pb2, scheduler_pb2
from bedplate.sandbox.v1 import event_pb2, explain_pb2, network_pb2, sandbox_pb2, service_pb2
from fleet.errors import InvalidSpecError

T = TypeVar("T")
# Copying a message costs as much as writing some fields.
KEPT_FIELDS_MIN = 8

_MODULES = (
    sandbox_pb2,
    account_pb2,
    host_pb2,
    progress_pb2,
    event_pb2,
    network_pb2,
    service_pb2,
    enrolment_pb2,
    budget_pb2,
    cycle_pb2,
    scheduler_pb2,
    explain_pb2,
)


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
    form: _Form = _form(type(value))  # type: ignore[arg-type]
    message = form.message_type()
    form.write(message, value)
    return message


def from_message(kind: type[T], message: Message) -> T:
    """The dataclass that a message stands for; raises InvalidSpecError `unknown_value` for an enum value it does not know."""
    value: T = _form(kind).read(message)  # type: ignore[arg-type]
    return value


Write = Callable[[Any, str, Any], None]
Read = Callable[[Any], Any]


class _Form:
    """How one dataclass is written and read, prepared once: a scheduler does either some ten thousand times a second."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self.message_type = _message_type(kind.__name__)
        hints = typing.get_type_hints(kind)
        fields = dataclasses.fields(kind)
        shapes = [_shape(hints[field.name]) for field in fields]
        self._names = tuple(field.name for field in fields)
        self._values = _getter(self._names)
        self._writes = tuple(_write_of(shape, field) for shape, field in zip(shapes, fields, strict=True))
        self._reads = tuple(_read_of(shape, field) for shape, field in zip(shapes, fields, strict=True))
        optional = [place for place, shape in enumerate(shapes) if shape.is_optional]
        self._optional = tuple((place, self._names[place]) for place in optional)
        # A spec is written into a record, an order and an answer, one after the other.
        self._is_kept = len(fields) >= KEPT_FIELDS_MIN
        self._kept: tuple[Any, Any] | None = None

    def write(self, message: Any, value: Any) -> None:
        """Fills an empty `message`."""
        for name, write, part in zip(self._names, self._writes, self._values(value), strict=True):
            if part is not None:
                write(message, name, part)

    def write_part(self, message: Any, value: Any) -> None:
        """Fills the empty `message` of a part; of a large part that comes again at once the message is copied."""
        kept = self._kept
        if kept is not None and kept[0] is value:
            message.CopyFrom(kept[1])
            return
        self.write(message, value)
        if self._is_kept:
            copy = self.message_type()
            copy.CopyFrom(message)
            self._kept = (value, copy)

    def read(self, message: Any) -> Any:
        """The dataclass of `message`."""
        parts = list(self._values(message))
        for place, name in self._optional:
            if not message.HasField(name):
                parts[place] = None
        for place, read in enumerate(self._reads):
            if read is not None and parts[place] is not None:
                parts[place] = read(parts[place])
        return self._kind(*parts)


@functools.cache
def _form(kind: Any) -> _Form:
    return _Form(kind)


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    get = operator.attrgetter(*names)
    return get if len(names) > 1 else lambda owner: (get(owner),)


@dataclasses.dataclass(frozen=True, slots=True)
class _Shape:
    """How a field is written: its inner type, and whether it repeats or may be absent."""

    inner: Any
    is_repeated: bool
    is_optional: bool
    is_message: bool
    is_enum: bool


def _write_of(shape: _Shape, field: Any) -> Write:
    if shape.is_message:
        return _write_messages(shape.inner) if shape.is_repeated else _write_message(shape, field.default)
    numbers = _enum_numbers(shape.inner) if shape.is_enum else None
    if shape.is_repeated:
        return lambda message, name, parts: getattr(message, name).extend(
            parts if numbers is None else [numbers[part] for part in parts]
        )
    if numbers is not None:
        return lambda message, name, part: setattr(message, name, numbers[part])
    return setattr if shape.is_optional else _write_plain


def _write_plain(message: Any, name: str, part: Any) -> None:
    # Zero is what an absent number, text or flag is read as.
    if part:
        setattr(message, name, part)


def _write_messages(inner: Any) -> Write:
    def write(message: Any, name: str, parts: Any) -> None:
        if parts:
            form, repeated = _form(inner), getattr(message, name)
            for part in parts:
                form.write(repeated.add(), part)

    return write


def _write_message(shape: _Shape, default: Any) -> Write:
    """Most parts of a spec are as they are by default: these are written, and read, as one."""

    made = _default_message(shape.inner, default)

    def write(message: Any, name: str, part: Any) -> None:
        own = getattr(message, name)
        own.SetInParent()
        if part is default:
            own.CopyFrom(made())
        else:
            _form(shape.inner).write_part(own, part)

    return write


def _read_of(shape: _Shape, field: Any) -> Read | None:
    read: Read | None = None
    if shape.is_message:
        read = _read_message(shape.inner, field.default)
    elif shape.is_enum:
        read = _read_enum(shape.inner, field.name)
    if not shape.is_repeated:
        return read
    return tuple if read is None else lambda parts: tuple(map(read, parts)) if parts else ()


def _read_message(inner: Any, default: Any) -> Read:
    if not isinstance(default, inner):
        return lambda message: _form(inner).read(message)
    made = _default_message(inner, default)
    return lambda message: default if message == made() else _form(inner).read(message)


def _read_enum(kind: type[StrEnum], field: str) -> Read:
    members = {number: member for member, number in _enum_numbers(kind).items()}

    def read(number: int) -> StrEnum:
        try:
            return members[number]
        except KeyError as error:
            message = f"{number} is no {kind.__name__} this version knows"
            raise InvalidSpecError(
                "unknown_value", message, f"set it to one of {', '.join(kind)}", field=field
            ) from error

    return read


def _default_message(inner: Any, default: Any) -> Callable[[], Any]:
    @functools.cache
    def made() -> Any:
        message = _message_type(inner.__name__)()
        _form(inner).write(message, default)
        return message

    return made


def _enum_numbers(kind: type[StrEnum]) -> dict[StrEnum, int]:
    numbers = _message_type(kind.__name__)
    return {member: int(numbers.Value(_enum_prefix(kind) + member.name)) for member in kind}


def _enum_prefix(kind: type[StrEnum]) -> str:
    name = kind.__name__
    return "".join("_" + char if char.isupper() and index else char for index, char in enumerate(name)).upper() + "_"


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
