"""Text for people: tables and wrapped lines within WIDTH, ages, colours for terminals, and guests' text made harmless."""

import os
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TextIO

from fleet.model.units import render_seconds

WIDTH = 80
COLUMN_GAP = "  "

_COLOURS = {"red": "31", "green": "32", "cyan": "36", "bold": "1"}
# Control, format (bidirectional overrides among them), surrogate, unassigned; line and paragraph separators.
_UNSAFE = frozenset(["Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"])

# Where a command that is suggested has a sandbox's name.
_PLACE_OF_NAME = re.compile(r"(\bmb [a-z]+ )NAME\b")


def is_coloured(stream: TextIO) -> bool:
    """Whether `stream` is a terminal whose user has not set NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, colour: str) -> str:
    """`text` in a colour."""
    return f"\033[{_COLOURS[colour]}m{text}\033[0m"


def clean(text: str, keep: str = "") -> str:
    """`text` with every character that could steer a terminal written out; those in `keep` stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in keep or unicodedata.category(char) not in _UNSAFE else _escape(char) for char in text
    )


def shorten(text: str, width: int) -> str:
    """`text` cut to `width` characters, with `…` where it was cut."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def wrap(label: str, text: str, indent: int = 13) -> list[str]:
    """`label` and `text` as lines of at most WIDTH, the text in a column of its own."""
    lines = textwrap.wrap(clean(text), WIDTH - indent) or [""]
    return [(label if index == 0 else "").ljust(indent) + line for index, line in enumerate(lines)]


def flow(label: str, text: str) -> list[str]:
    """`label` and `text` as lines of at most WIDTH, indented as the label is long; a path or command is never cut in two."""
    first, *words = clean(text).split() or [""]
    lines = [label + first]
    for word in words:
        if len(lines[-1]) + 1 + len(word) <= WIDTH:
            lines[-1] += " " + word
        else:
            lines.append(" " * len(label) + word)
    return lines


def render_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table within WIDTH; where it is too wide the widest column gives way."""
    cells = [list(headers), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(headers))]
    room = WIDTH - len(COLUMN_GAP) * (len(widths) - 1)
    while sum(widths) > room:
        widths[widths.index(max(widths))] -= 1
    return [_join(row, widths) for row in cells]


def fill_name(text: str, name: str) -> str:
    """A next step such as "mb status NAME" with the sandbox's own name in it."""
    return _PLACE_OF_NAME.sub(lambda found: found[1] + name, text)


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 file", "2 files"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def render_age(from_ms: int, now_ms: int) -> str:
    """How long ago something was, in one unit: "42 s", "5 m", "3 h", "12 d"."""
    age_s = max(now_ms - from_ms, 0) // 1000
    for unit, seconds in (("d", 86_400), ("h", 3600), ("m", 60)):
        if age_s >= 2 * seconds:
            return f"{age_s // seconds} {unit}"
    return f"{age_s} s"


def render_span(from_ms: int, to_ms: int) -> str:
    """The time between two moments."""
    return render_seconds(max(to_ms - from_ms, 0) / 1000)


def _join(row: Sequence[str], widths: Sequence[int]) -> str:
    return COLUMN_GAP.join(shorten(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii") if char != "\t" else "    "
