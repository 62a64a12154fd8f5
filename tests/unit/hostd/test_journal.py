"""The journal keeps every event that was told to be kept, in order, over crashes, damage and its own bounds."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet.model.event import Event
from fleet.model.ids import SandboxId, Tenant
from hostd.journal import SEGMENT_BYTES_MAX, SEGMENTS_MAX, Cursor, Journal, decode_line, encode_line

A, B = SandboxId("a" * 12), SandboxId("b" * 12)


def event(detail: str = "", sandbox_id: SandboxId = A, tenant: str = "acme", at_ms: int = 1) -> Event:
    return Event(sandbox_id, Tenant(tenant), "", 0, at_ms, "guest", "agent.phase_changed", detail=detail)


def read_all(journal: Journal, *words: str) -> list[Event]:
    found, cursor = [], Cursor()
    while True:
        events, reached = journal.read(cursor, *words)
        found += events
        if reached == cursor:
            return found
        cursor = reached


def test_numbers_rise_over_restarts(tmp_path: Path) -> None:
    """Each event has the origin and a number of its own, also after the journal was opened anew."""
    Journal(tmp_path, "host/h1").append([event("one"), event("two")])
    journal = Journal(tmp_path, "host/h1")
    journal.append([event("three")])
    assert [(one.seq, one.detail, one.origin) for one in read_all(journal)] == [
        (1, "one", "host/h1"),
        (2, "two", "host/h1"),
        (3, "three", "host/h1"),
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(1, 200), junk=st.binary(max_size=40))
def test_a_torn_tail_is_cut_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes) -> None:
    """Wherever the last write broke off, everything before it is there, and what follows is readable."""
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder, "host/h1")
    for detail in ("one", "two", "three"):
        journal.append([event(detail)])
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    path.write_bytes(whole[: len(whole) - min(cut, last)] + junk.replace(b"\n", b""))
    again = Journal(folder, "host/h1")
    again.append([event("four")])
    details = [one.detail for one in read_all(again)]
    assert details in (["one", "two", "four"], ["one", "two", "three", "four"])
    numbers = [one.seq for one in read_all(again)]
    assert numbers == sorted(set(numbers))


def test_a_damaged_line_is_passed_over(tmp_path: Path) -> None:
    """A bad sector in the middle costs the lines it hit; the others are read, and numbers go on behind them."""
    journal = Journal(tmp_path, "host/h1")
    for detail in ("one", "two", "three"):
        journal.append([event(detail)])
    (path,) = tmp_path.iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"two", b"owt") + lines[2])
    again = Journal(tmp_path, "host/h1")
    again.append([event("four")])
    assert [(one.seq, one.detail) for one in read_all(again)] == [(1, "one"), (3, "three"), (4, "four")]


def test_only_so_much_is_kept(tmp_path: Path) -> None:
    """Segments are bounded in size and number, the oldest goes, and a reader that stood in it goes on with the next."""
    journal = Journal(tmp_path, "host/h1")
    batch = [event("x" * 500)] * 10_000
    for _ in range(SEGMENTS_MAX + 2):
        journal.append(batch)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert (len(sizes), max(sizes) <= SEGMENT_BYTES_MAX) == (SEGMENTS_MAX, True)
    events, _ = journal.read(Cursor(1, 100))
    assert events[0].seq == 2 * len(batch) + 1


def test_a_reader_gets_what_it_asks_for(tmp_path: Path) -> None:
    """By sandbox and by tenant; an event that comes later is found where the reader stopped."""
    journal = Journal(tmp_path, "host/h1")
    journal.append([event("a"), event("b", B, "other")])
    assert [one.detail for one in read_all(journal, A)] == ["a"]
    assert [one.detail for one in read_all(journal, "other")] == ["b"]
    _, end = journal.read(Cursor())
    assert journal.read(end) == ([], end)
    journal.append([event("c")])
    assert [one.detail for one in journal.read(end)[0]] == ["c"]


@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_line_or_none(content: bytes) -> None:
    """What is no line of ours is none, and raises nothing."""
    assert decode_line(content) is None


@given(detail=st.text(max_size=500), cause=st.text(max_size=64))
def test_a_line_round_trips(detail: str, cause: str) -> None:
    """Whatever a reason says, its line is one line, and gives the event again."""
    one = Event(A, Tenant("acme"), "host/h1", 7, 5, "guest", "x.y", cause, detail=detail)
    line = encode_line(one)
    assert (line.count(b"\n"), decode_line(line)) == (1, one)
