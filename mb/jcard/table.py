"""Reads one TOML table key by key. Whatever is wrong becomes a fault that names the field as it is written; reading goes on."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fleet.model.admission import FieldRefusal
from fleet.model.units import MIB, parse_duration_s, parse_size_bytes

T = TypeVar("T")

# The code of a fault beside which no other is worth telling: nothing of the file was read.
SYNTAX_INVALID = "syntax_invalid"
# How much of a wrong value a message repeats.
SHOWN_CHARS_MAX = 60
# TOML's own bound, which its hexadecimal numbers can pass in Python.
INTEGER_MAX = 2**63 - 1

_SIZE = 'write for example "512MiB" or "4GiB"'
_DURATION = 'write for example "30s" or "1m30s"'
_VARIABLE = re.compile(r"\$\{([^}]*)\}?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORDS: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """One jcard being read: the caller's variables, and what was found and asked for so far."""

    environment: Mapping[str, str]
    faults: list[FieldRefusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def note(self, text: str) -> None:
        """Notes something that the user may want to know."""
        self.notes.append(text)

    def is_faulty(self, name: str) -> bool:
        """Whether something is wrong with the field of that name already."""
        return any(fault.field == name for fault in self.faults)


class Table:
    """One table of a jcard. Keys that nobody asked for by the time of `finish` are unknown.

    No message repeats a value of a table that is `secret`.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str, reading: Reading, *, secret: bool = False) -> None:
        self.name = prefix
        self.reading = reading
        self._values = values
        self._secret = secret
        self._asked: list[str] = []

    def has(self, key: str, kind: type = object) -> bool:
        """Whether the user wrote `key`, and as that kind of value."""
        return key in self._values and isinstance(self._values[key], kind)

    def fault(self, key: str, message: str, next_step: str, code: str = "field_invalid") -> None:
        """Notes that `key` is wrong."""
        self.reading.faults.append(FieldRefusal(self._field(key), code, message, next_step))

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        return self._get(key, str, default)

    def integer(self, key: str, default: int) -> int:
        """A whole number."""
        value = self._get(key, int, default)
        if abs(value) <= INTEGER_MAX:
            return value
        self.fault(key, f"{self._shown(value)} is too large a number", "write a smaller one")
        return default

    def fraction(self, key: str, default: float) -> float:
        """A number, whole or not."""
        value = self._values.get(key)
        return float(self.integer(key, 0)) if type(value) is int else self._get(key, float, default)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        return self._get(key, bool, default)

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of `allowed`."""
        value = self.text(key, default)
        if value in allowed:
            return value
        self.fault(key, f"{self._shown(value)} is not known", f"write one of {', '.join(allowed)}")
        return default

    def size_mib(self, key: str, default: int) -> int:
        """A size such as "4GiB", in MiB."""
        text = self._get(key, str, "", _SIZE)
        if not self.has(key, str):
            return default
        try:
            size_bytes = parse_size_bytes(text)
        except ValueError:
            self.fault(key, f"{self._shown(text)} is no size", _SIZE)
            return default
        if size_bytes % MIB:
            self.fault(key, f"{self._shown(text)} is no whole number of MiB", _SIZE)
        return size_bytes // MIB

    def duration_s(self, key: str, default: float) -> float:
        """A Go duration such as "1m30s", in seconds."""
        text = self._get(key, str, "", _DURATION)
        if not self.has(key, str):
            return default
        try:
            return parse_duration_s(text)
        except ValueError:
            self.fault(key, f"{self._shown(text)} is no duration", _DURATION)
            return default

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._get(key, list, [])
        for index, value in enumerate(values):
            if not isinstance(value, str):
                self.fault(
                    f"{key}[{index}]", f"{self._shown(value)} is not a string", "put it in quotes", "type_invalid"
                )
        return tuple(value for value in values if isinstance(value, str))

    def variables(self, key: str, *, secret: bool = False) -> dict[str, str]:
        """A table of strings in which `${VAR}` is the caller's variable."""
        table = self.table(key, secret=secret)
        return {name: table.expanded(name) for name in table._take_all()}

    def expanded(self, key: str) -> str:
        """A string in which each `${VAR}` is replaced by the caller's variable; an unset one is a fault."""

        def replace(match: re.Match[str]) -> str:
            name = match.group(1)
            if not match.group(0).endswith("}") or not _NAME.fullmatch(name):
                self.fault(key, f"{self._shown(match.group(0))} is no variable", "write ${NAME}")
            elif name not in self.reading.environment:
                next_step = f"export {name}, or write its value"
                self.fault(key, f"the variable {name} is not set", next_step, "variable_unset")
            elif not _is_text(self.reading.environment[name]):
                self.fault(key, f"the variable {name} is not UTF-8 text", "set it to text")
            else:
                return self.reading.environment[name]
            return ""

        return _VARIABLE.sub(replace, self.text(key))

    def table(self, key: str, *, secret: bool = False) -> "Table":
        """A table inside this one; an empty one when it is not there."""
        holder = Table(self._values, self.name, self.reading, secret=True) if secret else self
        self._asked.append(key)
        return Table(holder._get(key, dict, {}), self._field(key), self.reading, secret=holder._secret)

    def tables(self, key: str) -> list["Table"]:
        """A list of tables, each named `[[key]][index]`."""
        found = []
        for index, value in enumerate(self._get(key, list, [])):
            name = f"[[{self._field(key)}]][{index}]"
            if not isinstance(value, dict):
                message = f"{self._shown(value)} is not a table"
                next_step = f"write [[{self._field(key)}]]"
                self.reading.faults.append(FieldRefusal(name, "type_invalid", message, next_step))
                continue
            found.append(Table(value, name, self.reading))
        return found

    def finish(self) -> None:
        """Refuses every key that was not asked for, and suggests the nearest known one."""
        for key in self._values:
            if key in self._asked:
                continue
            near = difflib.get_close_matches(key, self._asked, n=1, cutoff=0.6)
            known = "known here: " + ", ".join(sorted(set(self._asked)))
            next_step = f"did you mean {near[0]}?" if near else known
            self.fault(key[:SHOWN_CHARS_MAX], "this key is not known", next_step, "key_unknown")

    def _shown(self, value: object) -> str:
        return "this value" if self._secret else shown(value)

    def _take_all(self) -> list[str]:
        """Every key of a table whose keys are the user's own; none is unknown."""
        self._asked.extend(self._values)
        return list(self._values)

    def _field(self, key: str) -> str:
        """The name of `key` as the user would write it."""
        return f"{self.name}.{key}" if self.name else key

    def _get(self, key: str, kind: type[T], default: T, next_step: str = "") -> T:
        self._asked.append(key)
        self.reading.asked.add(self._field(key))
        if key not in self._values:
            return default
        value = self._values[key]
        if type(value) is kind:
            return value
        self.fault(
            key, f"{self._shown(value)} is not {_WORDS[kind]}", next_step or f"write {_WORDS[kind]}", "type_invalid"
        )
        return default


def _is_text(value: str) -> bool:
    # What is no UTF-8 in the environment is a lone surrogate in Python.
    return not any("\ud800" <= char <= "\udfff" for char in value)


def shown(value: object) -> str:
    """A value as a message repeats it: as Python writes it, and short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or very deep nesting
        text = "this value"
    return text if len(text) <= SHOWN_CHARS_MAX else text[: SHOWN_CHARS_MAX - 1] + "…"
