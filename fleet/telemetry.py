"""Logging: structlog, one JSON object a line on stderr, so that journald or a file is the operator's choice.

Events are constant `noun.verb_past`; secrets and guest output are never logged; pure code never logs.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

# A field longer than this is cut: a hostile name or error text must not fill the log.
FIELD_CHARS_MAX = 2000
# The field that format_exc_info makes of an error.
TRACE = "exception"


def configure_logging(program: str, level: str = "info") -> None:
    """Sends this process's log to stderr as JSON lines that carry `program`; `level` is debug, info, warning or error."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _cut_fields,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(program=program)


def _cut_fields(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    return {key: _cut_trace(value) if key == TRACE else _cut(value) for key, value in event.items()}


def _cut_trace(trace: str) -> str:
    # Its last line says what went wrong, its first lines only how it came there.
    return "…" + trace[-FIELD_CHARS_MAX:] if len(trace) > FIELD_CHARS_MAX else trace


def _cut(value: Any) -> Any:
    if value is None or isinstance(value, bool | float):
        return value
    text = value if isinstance(value, str) else repr(value)
    return text[:FIELD_CHARS_MAX] + "…" if len(text) > FIELD_CHARS_MAX else value
