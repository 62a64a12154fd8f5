"""A sandbox's network log: each denial once, through restarts, torn writes, new counters and a full file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.errors import HostFaultError
from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Agent, Goal, SandboxSpec
from hostd.traffic import LOG_BYTES_MAX, NAME, Traffic

SPEC = SandboxSpec("box", agents=(Agent("one", "custom", ("true",)),))
ORDER = Assignment(
    SandboxId("a" * 12), Tenant("acme"), HostId("host"), SPEC, Digest("sha256:" + "0" * 64), 64, Goal.RUN, 1, 1, 1
)


class Clock:
    """Milliseconds, one more at each look."""

    def __init__(self) -> None:
        self.ms = 1000

    def __call__(self) -> int:
        self.ms += 1
        return self.ms


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the sandbox's files lie."""
    path = tmp_path / ORDER.sandbox_id
    path.mkdir()
    return path


def opened(folder: Path) -> Traffic:
    """The logs as a hostd that starts finds them."""
    return Traffic(lambda sandbox_id: folder.parent / sandbox_id, Clock())


def told(traffic: Traffic) -> list[tuple[int, str, int]]:
    """Number, cause and count of all events."""
    return [(event.seq, event.reason, event.count) for event in traffic.read(ORDER.sandbox_id)]


def test_each_look_tells_what_is_new(folder: Path) -> None:
    """Counters come as sums, events as differences; a look without news writes nothing."""
    traffic = opened(folder)
    calls: list[int] = []
    traffic.on_append(lambda: calls.append(1))
    for drops in ({"closed": 3, "ipv6": 0}, {"closed": 3, "ipv6": 0}, {"closed": 5, "ipv6": 1}):
        traffic.note_drops(ORDER, drops)
    assert told(traffic) == [(1, "closed", 3), (2, "closed", 2), (3, "ipv6", 1)]
    assert len(calls) == 2
    event = traffic.read(ORDER.sandbox_id, after_seq=2)[0]
    assert (event.tenant, event.kind, event.is_denied, event.sandbox_id) == (
        ORDER.tenant,
        "frames",
        True,
        ORDER.sandbox_id,
    )
    assert event.at_ms > 1000


def test_a_restart_tells_nothing_twice(folder: Path) -> None:
    """The counters live on in the kernel: the next hostd tells what has come since."""
    opened(folder).note_drops(ORDER, {"closed": 3})
    again = opened(folder)
    again.note_drops(ORDER, {"closed": 4})
    assert told(again) == [(1, "closed", 3), (2, "closed", 1)]


@pytest.mark.parametrize("restarts", [False, True])
def test_new_rules_count_from_nothing(folder: Path, *, restarts: bool) -> None:
    """After the last look the same number is news; so is a counter that went back."""
    traffic = opened(folder)
    traffic.note_drops(ORDER, {"closed": 3})
    traffic.note_drops(ORDER, {"closed": 3}, is_last=True)
    traffic = opened(folder) if restarts else traffic
    traffic.note_drops(ORDER, {"closed": 3})
    traffic.note_drops(ORDER, {"closed": 1})
    assert told(traffic) == [(1, "closed", 3), (2, "closed", 3), (3, "closed", 1)]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_line_is_told_again(folder: Path, cut: int) -> None:
    """What a crash has cut short was never told; what follows is whole."""
    traffic = opened(folder)
    traffic.note_drops(ORDER, {"closed": 3})
    traffic.note_drops(ORDER, {"closed": 5})
    path = folder / NAME
    path.write_bytes(path.read_bytes()[:-cut])
    again = opened(folder)
    again.note_drops(ORDER, {"closed": 6})
    assert told(again) == [(1, "closed", 3), (2, "closed", 3)]


def test_a_damaged_line_is_passed_over(folder: Path) -> None:
    """A disk that loses a line costs that line."""
    traffic = opened(folder)
    for packets in (1, 2, 3):
        traffic.note_drops(ORDER, {"closed": packets})
    path = folder / NAME
    lines = path.read_bytes().splitlines(keepends=True)
    wrong = [b"\x00\xff{", b"[1]", b"[" * 100_000, b'{"totals":[1]}', b'{"totals":{"closed":"x"}}', b'{"event":7}']
    wrong += [lines[1].strip().replace(b'"total":2', b'"total":null'), b'{"event":{"seq":"9"}}']
    path.write_bytes(lines[0] + b"\n".join(wrong) + b"\n" + lines[2])
    again = opened(folder)
    assert told(again) == [(1, "closed", 1), (3, "closed", 1)]
    again.note_drops(ORDER, {"closed": 4})
    assert told(again)[-1] == (4, "closed", 1)


def test_the_files_are_bounded_and_nothing_is_told_twice_across_them(folder: Path) -> None:
    """The newest events are kept, and the counts go on also when the line that had them is gone."""
    traffic = opened(folder)
    traffic.note_drops(ORDER, {"wrong_mac": 7})
    packets = 0
    while not (folder / f"{NAME}.old").exists() or (folder / NAME).stat().st_size < LOG_BYTES_MAX - 400:
        packets += 1
        traffic.note_drops(ORDER, {"wrong_mac": 7, "closed": packets})
    for _ in range(10):
        packets += 1
        traffic.note_drops(ORDER, {"wrong_mac": 7, "closed": packets})
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * LOG_BYTES_MAX
    assert all(reason == "closed" for _, reason, _ in told(traffic))
    again = opened(folder)
    again.note_drops(ORDER, {"wrong_mac": 8, "closed": packets})
    numbers = [seq for seq, _, _ in told(again)]
    assert numbers == list(range(numbers[0], packets + 3))
    assert told(again)[-1][1:] == ("wrong_mac", 1)


def test_an_append_that_fails_is_told_with_the_next(folder: Path) -> None:
    """A full disk loses no denial: the counters still have it."""
    traffic = opened(folder)
    traffic.note_drops(ORDER, {"closed": 1})
    (folder / NAME).rename(folder / "kept")
    (folder / NAME).mkdir()
    with pytest.raises(HostFaultError) as caught:
        traffic.note_drops(ORDER, {"closed": 2})
    assert caught.value.code == "disk_failed"
    (folder / NAME).rmdir()
    (folder / "kept").rename(folder / NAME)
    traffic.note_drops(ORDER, {"closed": 4})
    assert told(traffic) == [(1, "closed", 1), (2, "closed", 3)]


def test_a_sandbox_without_a_folder_has_no_log(folder: Path) -> None:
    """One that is being removed is not brought back by its last frames."""
    gone = replace(ORDER, sandbox_id=SandboxId("z" * 12))
    traffic = opened(folder)
    traffic.note_drops(gone, {"closed": 1}, is_last=True)
    assert traffic.read(gone.sandbox_id) == []
    assert not (folder.parent / gone.sandbox_id).exists()


def test_the_file_is_for_its_host_alone(folder: Path) -> None:
    """Nobody else reads where a tenant's agents went; a line is plain JSON for whoever may."""
    opened(folder).note_drops(ORDER, {"closed": 1})
    path = folder / NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["event"]["reason"] == "closed"
