"""The log is one JSON object a line on stderr, and no field of it without a bound."""

import json
import subprocess
import sys

import pytest

from fleet.telemetry import FIELD_CHARS_MAX

# Logging is configured once for a process: each test has its own.
PROGRAM = """
import sys, structlog
from fleet.telemetry import configure_logging
configure_logging("tester", sys.argv[1])
log = structlog.get_logger()
exec(sys.argv[2])
"""


def run(code: str, level: str = "info") -> list[dict[str, object]]:
    """What a process logs that runs `code`; its stdout stays empty."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, level, code], check=True, capture_output=True, text=True)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_a_line_is_an_object() -> None:
    """Event, level, time, program and the fields, types kept."""
    (line,) = run("log.info('sandbox.started', count=3, share=0.5, is_on=True, nothing=None, steps=['a', 'b'])")
    assert line.pop("timestamp")
    expected = {"count": 3, "share": 0.5, "is_on": True, "nothing": None, "steps": ["a", "b"]}
    assert line == {"event": "sandbox.started", "level": "info", "program": "tester", **expected}


@pytest.mark.parametrize("value", ["'x' * 10**6", "['x' * 10**6]", "{'a': 'x' * 10**6}", "b'x' * 10**6", "10**4000"])
def test_a_field_is_cut(value: str) -> None:
    """Of whatever type: a hostile name or a long list does not fill the disk."""
    (line,) = run(f"log.warning('thing.happened', field={value})")
    assert len(str(line["field"])) <= FIELD_CHARS_MAX + 1
    assert str(line["field"]).endswith("…")


def test_a_name_cannot_forge_a_line() -> None:
    """Newlines, quotes and lone surrogates stay inside of their string."""
    (line,) = run("log.info('thing.happened', name='a\\n{\"event\": \"forged\"}\\ud800')")
    assert line["event"] == "thing.happened"


def test_an_exception_is_a_field() -> None:
    """With its trace, on the same line, cut like any other."""
    (line,) = run("try: 1 / 0\nexcept ZeroDivisionError as error: log.error('thing.failed', exc_info=error)")
    assert "ZeroDivisionError" in str(line["exception"])


def test_the_level_holds() -> None:
    """Below it nothing is written."""
    events = [line["event"] for line in run("log.debug('a'); log.info('b'); log.warning('c')", "warning")]
    assert events == ["c"]


def test_a_long_trace_keeps_its_end() -> None:
    """What went wrong stands in the last line, however deep it happened."""
    # Two that call each other: Python sums up one that calls itself.
    code = """
def f(n): g(n)
def g(n): 1 / n if n == 0 else f(n - 1)
try:
    f(60)
except ZeroDivisionError as error:
    log.error('thing.crashed', exc_info=error)
"""
    (line,) = run(code)
    assert str(line["exception"]).endswith("ZeroDivisionError: division by zero")
    assert len(str(line["exception"])) == FIELD_CHARS_MAX + 1
