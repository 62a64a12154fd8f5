"""Reads a program's TOML file into its frozen dataclass: every key is known and typed, or the file is refused."""

import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from fleet.errors import InvalidSpecError, NotFoundError

T = TypeVar("T")

# A configuration is a page or two; this only stops a wrong file from being read whole.
CONFIG_BYTES_MAX = 1024 * 1024


def load_config(kind: type[T], path: Path) -> T:
    """The configuration in `path`; raises NotFoundError, or InvalidSpecError that names the field and what it should be."""
    try:
        with path.open("rb") as stream:
            content = stream.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise NotFoundError(
            "config_unreadable", f"{path}: {error.strerror}", "name a readable file with --config"
        ) from error
    if len(content) > CONFIG_BYTES_MAX:
        raise InvalidSpecError("config_syntax", f"{path}: it is past {CONFIG_BYTES_MAX} bytes", "name a configuration")
    return parse_config(kind, content.decode("utf-8", "replace"), str(path))


def parse_config(kind: type[T], text: str, origin: str) -> T:
    """The configuration in `text`; `origin` names it in errors."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSpecError("config_syntax", f"{origin}: {error}", "mend the TOML") from error
    return _build(kind, table, origin)


def _build(kind: type[T], table: dict[str, Any], origin: str, prefix: str = "") -> T:
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for name in table:
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise _invalid(prefix + name, origin, "this key is not known", f"known keys: {known}")
    for name, field in fields.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and name not in table:
            raise _invalid(prefix + name, origin, "it is missing", "add it")
    return kind(**{name: _convert(hints[name], value, origin, prefix + name) for name, value in table.items()})


def _convert(hint: Any, value: Any, origin: str, field: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, origin, field + ".")  # type: ignore[arg-type]
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in hint.__args__ if part is not types.NoneType)
        return _convert(hint, value, origin, field)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, entry, origin, f"{field}[{index}]") for index, entry in enumerate(value))
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        inner = typing.get_args(hint)[1]
        return {name: _convert(inner, entry, origin, f"{field}.{name}") for name, entry in value.items()}
    return _convert_plain(hint, value, origin, field)


def _convert_plain(hint: Any, value: Any, origin: str, field: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise _invalid(field, origin, f"{value!r} is not of type {expected}", f"write a {expected}")


def _invalid(field: str, origin: str, message: str, next_step: str) -> InvalidSpecError:
    return InvalidSpecError("config_invalid", f"{message} ({origin})", next_step, field=field)
