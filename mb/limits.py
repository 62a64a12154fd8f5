"""Limits as users write them: in a jcard's [budget], and as options of `mb budget set`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal

from fleet.errors import InvalidSpecError
from fleet.model.sandbox import Amounts, Limits, Totals
from fleet.model.units import MIB, parse_duration_s, parse_size_bytes

MICRO = 1_000_000
NONE = "none"

_COUNT = re.compile(r"[0-9]{1,12}")
_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing that can be limited: its word, the field of Amounts or Totals, how it is written, and an example."""

    word: str
    field: str
    kind: str
    example: str


DIMENSIONS = (
    Dimension("vcpus", "vcpus", "count", "8"),
    Dimension("memory", "memory_mib", "size_mib", "64GiB"),
    Dimension("disk", "disk_mib", "size_mib", "1TiB"),
    Dimension("gpus", "gpu_milli", "milli", "2"),
    Dimension("sandboxes", "sandboxes", "count", "100"),
    Dimension("depth", "depth", "count", "2"),
    Dimension("wall_clock", "wall_ms", "span_ms", "100h"),
    Dimension("vcpu_time", "vcpu_ms", "span_ms", "500h"),
    Dimension("gpu_time", "gpu_ms", "span_ms", "20h"),
    Dimension("egress", "egress_bytes", "size_bytes", "10GiB"),
    Dimension("cost", "cost_micro", "money", "120.50"),
)
WORDS = {one.word: one for one in DIMENSIONS}
CONCURRENT = frozenset(one.name for one in fields(Amounts))


def parse_limits(texts: Mapping[str, str]) -> dict[str, int]:
    """Fields of Amounts and Totals by name, from words and texts; `none` is 0. Raises InvalidSpecError `limit_invalid`."""
    return {WORDS[word].field: parse_limit(WORDS[word], text) for word, text in texts.items()}


def parse_limit(dimension: Dimension, text: str) -> int:
    """One limit, in the field's unit; raises InvalidSpecError `limit_invalid`."""
    if text == NONE:
        return 0
    try:
        found = _parse(dimension.kind, text)
    except ValueError:
        found = 0
    if found <= 0:
        message = f"{text[:40]!r} is no limit of {dimension.word}"
        next_step = f"write for example {dimension.example}, or none"
        raise InvalidSpecError("limit_invalid", message, next_step, field=dimension.word.replace("_", "-"))
    return found


def parse_money(text: str, field: str) -> int:
    """Millionths of an amount such as "0.04"; raises InvalidSpecError `price_invalid`."""
    if not _DECIMAL.fullmatch(text):
        message = f"{text[:40]!r} is no price"
        raise InvalidSpecError("price_invalid", message, "write for example 0.04", field=field.replace("_", "-"))
    return int(Decimal(text) * MICRO)


def with_changes(limits: Limits, changes: Mapping[str, int]) -> Limits:
    """The limits with those fields set."""
    concurrent = {one.name: getattr(limits.concurrent, one.name) for one in fields(Amounts)}
    total = {one.name: getattr(limits.total, one.name) for one in fields(Totals)}
    for name, value in changes.items():
        (concurrent if name in CONCURRENT else total)[name] = value
    return Limits(Amounts(**concurrent), Totals(**total))


def _parse(kind: str, text: str) -> int:
    if kind == "count":
        return int(text) if _COUNT.fullmatch(text) else 0
    if kind == "size_mib":
        return parse_size_bytes(text) // MIB
    if kind == "size_bytes":
        return parse_size_bytes(text)
    if kind == "span_ms":
        return round(parse_duration_s(text, has_days=True) * 1000)
    factor = MICRO if kind == "money" else 1000
    return int(Decimal(text) * factor) if _DECIMAL.fullmatch(text) else 0
