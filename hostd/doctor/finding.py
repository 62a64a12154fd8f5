"""What a check found, and how it is shown. PURE."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

WIDTH = 80
# "warn  " and the longest name of a check.
INDENT = 20


class Level(StrEnum):
    """How bad it is: a host with a failure does not work, one with a warning does."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's answer: what is there, and the next step when that is not right."""

    check: str
    level: Level
    found: str
    next_step: str = ""


def ok(check: str, found: str) -> Finding:
    """It is as it must be."""
    return Finding(check, Level.OK, found)


def warn(check: str, found: str, next_step: str) -> Finding:
    """It works, and somebody should know."""
    return Finding(check, Level.WARN, found, next_step)


def fail(check: str, found: str, next_step: str) -> Finding:
    """It keeps hostd, or its VMs, from working."""
    return Finding(check, Level.FAIL, found, next_step)


def render(findings: Iterable[Finding]) -> list[str]:
    """Lines within WIDTH, with the next step below what is not right, and a count at the end."""
    shown = list(findings)
    lines = [line for finding in shown for line in _render_one(finding)]
    counts = ", ".join(f"{sum(one.level is level for one in shown)} {level}" for level in Level)
    return [*lines, counts]


def _render_one(finding: Finding) -> list[str]:
    label = f"{finding.level:<6}{finding.check}"
    lines = textwrap.wrap(_clean(finding.found), WIDTH - INDENT) or [""]
    steps = textwrap.wrap(f"next: {_clean(finding.next_step)}", WIDTH - INDENT) if finding.next_step else []
    return [(label if index == 0 else "").ljust(INDENT) + line for index, line in enumerate([*lines, *steps])]


def _clean(text: str) -> str:
    # Programs' words may hold anything; a terminal gets what can be printed.
    return "".join(char if char.isprintable() else " " for char in text)
