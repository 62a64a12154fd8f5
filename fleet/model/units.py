"""Sizes and durations as people write them, and back."""

import re
from fractions import Fraction

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_SIZE = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,3}))?\s*(B|KiB|MiB|GiB|TiB)")
_SIZE_FACTORS = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|h|d)")
_SECONDS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(24 * 3600),
}


def parse_size_bytes(text: str) -> int:
    """Bytes in a size such as "4GiB", "1.5GiB" or "512 MiB"; raises ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 512MiB or 4GiB")
    whole, part, unit = match.groups()
    exact = Fraction(f"{whole}.{part or 0}") * _SIZE_FACTORS[unit]
    return int(exact)


def parse_duration_s(text: str, *, has_days: bool = False) -> float:
    """Seconds in a Go duration such as "30s", "1m30s" or "500ms"; raises ValueError for anything else.

    With `has_days` also "30d", which jcards do not know and people want.
    """
    position, total = 0, Fraction(0)
    while (match := _DURATION.match(text, position)) and (has_days or match.group(2) != "d"):
        total += Fraction(match.group(1)) * _SECONDS[match.group(2)]
        position = match.end()
    if position == 0 or position != len(text):
        raise ValueError(f"{text!r} is not a duration such as 30s, 1m30s or {'2d' if has_days else '500ms'}")
    return float(total)


def render_bytes(size_bytes: int) -> str:
    """A size for people, with one decimal at most: "512 MiB", "1.5 GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        factor = _SIZE_FACTORS[unit]
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size_bytes} B"


def render_seconds(duration_s: float) -> str:
    """A duration for people: "0.42 s", "12.3 s", "2 m 05 s", "3 h 07 m"."""
    # The limits are where rounding reaches the next form.
    if duration_s < 9.995:
        return f"{duration_s:.2f} s"
    if duration_s < 59.95:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} m {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} m"
