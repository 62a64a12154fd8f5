"""Moments and spans as users write them: "10m" ago, or a time of day with its zone."""

from datetime import UTC, datetime

from fleet.errors import InvalidSpecError
from fleet.model.units import parse_duration_s


def parse_since_ms(text: str, now_ms: int) -> int:
    """Milliseconds since 1970 of a moment: how long ago ("10m", "2d"), or RFC 3339; raises InvalidSpecError `since_invalid`."""
    try:
        return max(now_ms - round(parse_duration_s(text, has_days=True) * 1000), 1)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        next_step = "write how long ago, such as 10m, or a time with its zone, such as 2026-01-31T09:30:00Z"
        raise InvalidSpecError("since_invalid", f"{text!r} is no moment", next_step, field="--since")
    return max(round(moment.timestamp() * 1000), 1)


def parse_span_s(text: str, field: str) -> float:
    """Seconds of a span such as "90s", "10m" or "2d"; raises InvalidSpecError `duration_invalid` that names the option `field`."""
    try:
        return parse_duration_s(text, has_days=True)
    except ValueError as error:
        raise InvalidSpecError("duration_invalid", str(error), "write such as 90s or 10m", field=field) from error


def render_moment(at_ms: int) -> str:
    """A moment to the millisecond, in UTC: "2026-01-31T09:30:00.123Z"."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
