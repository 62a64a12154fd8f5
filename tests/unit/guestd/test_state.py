"""What survives a restart of guestd: its files, read by the next one as they were left."""

import json
import os
import stat
from pathlib import Path

import pytest

from guestd.configuration import Agent
from guestd.fault import GuestFault
from guestd.link import PAYLOAD_BYTES_MAX
from guestd.state import RESERVE_FILE_BYTES, RESERVE_FILES, State, nudge, put_json, take_nudges
from guestd.streams import AHEAD_BYTES_MAX, Stream
from guestd.workload import Crew, take_lock
from guestd.workload.cgroup import Cgroup
from guestd.workload.files import CUT_BY_DISK, FAILED, RECORD_BYTES, RUNNING, TIMED_OUT, AgentFiles, Record
from guestd.workload.supervisor import supervise

AGENT = {
    "name": "a",
    "command": ["true"],
    "workdir": "/",
    "env": [],
    "timeout_s": 0,
    "grace_period_s": 1,
    "memory_mib": 16,
    "pids_max": 4,
    "output_max_bytes": 100,
    "restart": "no",
    "max_restarts": 0,
    "session": "",
}
BOOT = "one boot"


@pytest.fixture
def state(tmp_path: Path) -> State:
    """The state of a guest that has just booted."""
    return State(str(tmp_path / "guestd"), BOOT)


@pytest.fixture
def files(state: State) -> AgentFiles:
    """The files of one agent that is to be started."""
    files = AgentFiles(state.agent_folder("a"))
    files.prepare()
    return files


def test_a_restarted_guestd_finds_its_state(state: State) -> None:
    """Configuration and the first fault are there, and that there was a guestd before."""
    assert (state.is_new, state.load_configuration(), state.load_failure()) == (True, None, None)
    state.put_configuration({"hostname": "box"})
    state.put_failure(GuestFault("first", "one"))
    state.put_failure(GuestFault("second", "two"))
    again = State(state.folder, BOOT)
    failure = again.load_failure()
    assert (again.is_new, again.load_configuration()) == (False, {"hostname": "box"})
    assert failure is not None
    assert (failure.code, failure.message) == ("first", "one")


def test_another_boot_begins_anew(state: State, files: AgentFiles, tmp_path: Path) -> None:
    """A kept disk brings nothing of guestd's along but the room it took; what lies beside, and behind symlinks, stays."""
    kept = tmp_path / "sources" / "0"
    kept.mkdir(parents=True)
    state.put_configuration({"hostname": "box"})
    state.put_failure(GuestFault("first", "one"))
    files.put_record(Record(RUNNING))
    Path(state.folder, "link").symlink_to(kept.parent)
    again = State(state.folder, "another boot")
    assert (again.is_new, again.load_configuration(), again.load_failure()) == (True, None, None)
    assert list(Path(state.folder, "agents").iterdir()) == []
    assert kept.is_dir()
    assert not State(state.folder, "another boot").is_new


@pytest.mark.parametrize("left", [None, "", "half"])
def test_a_boot_that_was_cut_short_is_another(state: State, left: str | None) -> None:
    """Without its whole name a boot's state is nobody's: a crash while it was written leaves nothing to believe."""
    state.put_configuration({"hostname": "box"})
    boot = Path(state.folder, "boot")
    boot.unlink()
    if left is not None:
        boot.write_text(left)
    again = State(state.folder, BOOT)
    assert (again.is_new, again.load_configuration()) == (True, None)


def test_only_root_reads_the_state(state: State, files: AgentFiles) -> None:
    """Folders are 0700 and files 0600, whatever the umask is."""
    umask = os.umask(0)
    try:
        state.put_configuration({})
        files.put_record(Record(RUNNING))
        AgentFiles(state.agent_folder("b")).prepare()
    finally:
        os.umask(umask)
    modes = {stat.S_IMODE(path.lstat().st_mode) for path in Path(state.folder).rglob("*") if not path.is_dir()}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in [Path(state.folder), Path(state.agent_folder("b"))]}
    assert (modes, folders) == ({0o600}, {0o700})


def test_nudges_are_never_lost_and_never_block(state: State) -> None:
    """Far more nudges than a FIFO holds are one nudge; after it there is none."""
    descriptor, other = state.open_nudges(), state.open_nudges()
    assert not take_nudges(descriptor)
    for _ in range(100_000):
        nudge(other)
    assert take_nudges(descriptor)
    assert not take_nudges(descriptor)
    os.close(descriptor)
    os.close(other)


def test_an_agent_is_started_once(files: AgentFiles) -> None:
    """A blank record is an agent that was never started; preparing its files again changes nothing."""
    assert not files.was_started()
    files.put_record(Record(RUNNING))
    files.prepare()
    assert files.was_started()


def test_room_is_set_aside_until_it_is_needed(state: State) -> None:
    """Blocks and inodes are taken before the first agent runs, and given back at the end, once or twice."""
    state.put_configuration({})
    kept = list(Path(state.folder, "reserve").iterdir())
    assert sum(path.stat().st_blocks * 512 for path in kept) >= RESERVE_FILES * RESERVE_FILE_BYTES
    state.release_reserve()
    state.release_reserve()
    assert list(Path(state.folder, "reserve").iterdir()) == []


@pytest.mark.parametrize("content", [b"{", b" " * RECORD_BYTES])
def test_a_record_that_is_being_written_is_no_end(files: AgentFiles, content: bytes) -> None:
    """Half a record says nothing."""
    Path(files.record).write_bytes(content)
    assert not files.load_record().has_ended


def test_a_record_keeps_its_length(files: AgentFiles) -> None:
    """An end fits where the start was written: a disk that the agent has filled does not matter."""
    files.put_record(Record(RUNNING))
    assert Path(files.record).stat().st_size == RECORD_BYTES
    files.put_record(Record(TIMED_OUT, exit_code=None, signal=9, message="é" * 10_000, cut=CUT_BY_DISK, restarts=3))
    found = files.load_record()
    assert Path(files.record).stat().st_size == RECORD_BYTES
    assert (found.state, found.signal, found.cut, found.restarts) == (TIMED_OUT, 9, CUT_BY_DISK, 3)
    assert found.has_ended
    assert len(json.dumps(found.describe())) < 1000


def test_an_agent_whose_supervisor_died_has_failed(state: State, files: AgentFiles, tmp_path: Path) -> None:
    """A free lock and no end: it is told as failed, and not started again."""
    files.put_record(Record(RUNNING))
    Crew([Agent(AGENT)], state, str(tmp_path)).ensure_started()
    record = files.load_record()
    assert (record.state, "supervisor was killed" in record.message) == (FAILED, True)


def test_a_supervised_agent_is_left_alone(state: State, files: AgentFiles, tmp_path: Path) -> None:
    """While its lock is held it runs, whoever started it."""
    lock = take_lock(files.lock)
    assert lock is not None
    assert take_lock(files.lock) is None
    files.put_record(Record(RUNNING))
    Crew([Agent(AGENT)], state, str(tmp_path)).ensure_started()
    assert files.load_record().state == RUNNING
    os.close(lock)


def test_an_agent_that_cannot_be_confined_is_not_run(state: State, files: AgentFiles, tmp_path: Path) -> None:
    """Where no limits can be set the agent fails before its program is started."""
    supervise(Agent(AGENT), files, Cgroup(str(tmp_path / "no-cgroup")), state.nudge_path)
    record = files.load_record()
    assert (record.state, record.exit_code) == (FAILED, None)
    assert "cannot be run in this guest" in record.message


def test_a_stream_waits_for_acks(tmp_path: Path) -> None:
    """Chunks follow each other, within a payload's limit, and stop a megabyte ahead of the host."""
    content = bytes(range(256)) * 8192
    (tmp_path / "file").write_bytes(content)
    stream = Stream(str(tmp_path / "file"))
    chunks = []
    while (chunk := stream.take_chunk()) is not None:
        chunks.append(chunk)
    assert [len(payload) for _, payload in chunks] == [PAYLOAD_BYTES_MAX] * 4
    assert b"".join(payload for _, payload in chunks) == content[:AHEAD_BYTES_MAX]
    stream.acknowledge(10)
    assert stream.take_chunk() == (AHEAD_BYTES_MAX, content[AHEAD_BYTES_MAX : AHEAD_BYTES_MAX + 10])
    assert not stream.is_sent


@pytest.mark.parametrize(("offset", "first"), [(-5, 0), (0, 0), (7, 7), (10, None), (99, None)])
def test_a_stream_resumes_where_the_host_is(tmp_path: Path, offset: int, first: int | None) -> None:
    """From the host's offset, and never past what there is."""
    (tmp_path / "file").write_bytes(b"0123456789")
    stream = Stream(str(tmp_path / "file"))
    stream.take_chunk()
    stream.resume(offset)
    chunk = stream.take_chunk()
    assert (chunk[0] if chunk else None) == first
    with (tmp_path / "file").open("ab") as more:
        more.write(b"later")
    later = stream.take_chunk()
    assert later == (10, b"later")


def test_a_file_is_written_at_once_or_not_at_all(tmp_path: Path) -> None:
    """What could not be written leaves the file as it was."""
    put_json(str(tmp_path / "f"), {"a": 1})
    with pytest.raises(TypeError):
        put_json(str(tmp_path / "f"), {"a": object()})
    assert json.loads((tmp_path / "f").read_text()) == {"a": 1}
