"""Sizes and durations are read exactly or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.model.units import GIB, MIB, parse_duration_s, parse_size_bytes, render_bytes, render_seconds


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0B", 0),
        ("4GiB", 4 * GIB),
        (" 512 MiB ", 512 * MIB),
        ("1.5GiB", 1536 * MIB),
        ("0.001KiB", 1),
        ("1TiB", 1024 * GIB),
    ],
)
def test_a_size_is_exact(text: str, size_bytes: int) -> None:
    """Binary units, a decimal part, spaces around."""
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "4", "4GB", "4gib", "-1MiB", "1e3MiB", "0x10MiB", "1.2345GiB", ".5GiB", "1_000MiB", "9" * 13 + "B", "1MiB2"],
)
def test_no_size_is_refused(text: str) -> None:
    """Decimal units are not guessed at, and nothing is cut."""
    with pytest.raises(ValueError, match="is not a size"):
        parse_size_bytes(text)


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [
        ("30s", 30.0),
        ("1m30s", 90.0),
        ("500ms", 0.5),
        ("1.5h", 5400.0),
        ("2h0m1s", 7201.0),
        ("1µs", 1e-6),
        ("3ns", 3e-9),
    ],
)
def test_a_duration_is_gos(text: str, duration_s: float) -> None:
    """Durations are those of Go, summed."""
    assert parse_duration_s(text) == duration_s


def test_days_where_people_wait() -> None:
    """Jcards keep to Go; a command line also takes days."""
    assert parse_duration_s("2d", has_days=True) == 2 * parse_duration_s("24h")
    assert parse_duration_s("1d12h", has_days=True) == 36 * 3600
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration_s("d", has_days=True)


@pytest.mark.parametrize("text", ["", "30", "s", "-1s", "1s ", "1 s", "1d", "1sm", "1h30", "nan", "infs", "٣s"])
def test_no_duration_is_refused(text: str) -> None:
    """A bare number is no duration: thirty of what?"""
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration_s(text)


@given(whole=st.integers(0, 10**6), unit=st.sampled_from(["B", "KiB", "MiB", "GiB"]))
def test_a_whole_size_never_loses_a_byte(whole: int, unit: str) -> None:
    """A whole number of units is that number of bytes."""
    factor = {"B": 1, "KiB": 1024, "MiB": MIB, "GiB": GIB}[unit]
    assert parse_size_bytes(f"{whole}{unit}") == whole * factor


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536 * MIB, "1.5 GiB"), (512 * MIB, "512 MiB")],
)
def test_a_size_for_people(size_bytes: int, text: str) -> None:
    """One decimal at most, and none where it would be zero."""
    assert render_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(0.424, "0.42 s"), (12.34, "12.3 s"), (125.0, "2 m 05 s"), (3599.6, "1 h 00 m"), (11220.0, "3 h 07 m")],
)
def test_a_duration_for_people(duration_s: float, text: str) -> None:
    """Two units at most."""
    assert render_seconds(duration_s) == text


@pytest.mark.parametrize(("duration_s", "text"), [(9.999, "10.0 s"), (59.97, "1 m 00 s")])
def test_rounding_carries_over(duration_s: float, text: str) -> None:
    """What rounds up to the next unit is written in it: never "60.0 s"."""
    assert render_seconds(duration_s) == text
