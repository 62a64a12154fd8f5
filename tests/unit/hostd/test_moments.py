"""Output is found by its time, to a second, and by its last lines."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.moments import ENTRIES_MAX, find_moment, find_tail, moments_path, note_moment


def write(path: Path, content: bytes, at_ms: int) -> None:
    with path.open("ab") as stream:
        note_moment(path, stream.tell(), at_ms)
        stream.write(content)


def test_output_is_found_by_its_time(tmp_path: Path) -> None:
    """All that came at a time or later, and at most a second's worth from before; nothing when nothing came since."""
    path = tmp_path / "agent"
    for second, content in ((10, b"ten"), (20, b"twenty"), (30, b"thirty")):
        write(path, content, second * 1000)
        write(path, b"+", second * 1000 + 500)
    assert [find_moment(path, ms) for ms in (1, 10_000, 10_999, 11_000, 20_500, 29_000, 31_000)] == [
        0,
        0,
        0,
        4,
        4,
        11,
        18,
    ]


def test_output_of_an_older_hostd_is_shown_whole(tmp_path: Path) -> None:
    """Without a note of times nothing is held back."""
    (tmp_path / "agent").write_bytes(b"old")
    assert find_moment(tmp_path / "agent", 10**15) == 0


def test_moments_are_bounded_and_still_sound(tmp_path: Path) -> None:
    """A list that is thinned out may show more than was asked for, never less."""
    path = tmp_path / "agent"
    for second in range(1, ENTRIES_MAX + 100):
        note_moment(path, second, second * 1000)
    path.write_bytes(bytes(ENTRIES_MAX + 200))
    assert moments_path(path).stat().st_size < ENTRIES_MAX * 16
    for second in (1, 2, 3, 1000, 1001, ENTRIES_MAX, ENTRIES_MAX + 99):
        assert second - 3 <= find_moment(path, second * 1000) <= second


@given(
    content=st.lists(st.sampled_from([b"a", b"bb", b"", b"c" * 70_000]), max_size=12),
    ends=st.booleans(),
    lines=st.integers(1, 14),
)
def test_the_last_lines(tmp_path_factory: pytest.TempPathFactory, content: list[bytes], ends: bool, lines: int) -> None:
    """As many as were asked for, or all; a last line without its end is one."""
    path = tmp_path_factory.mktemp("tail") / "agent"
    whole = b"\n".join(content) + (b"\n" if ends else b"")
    path.write_bytes(whole)
    expected = b"".join(whole.splitlines(keepends=True)[-lines:])
    assert whole[find_tail(path, lines) :] == expected
