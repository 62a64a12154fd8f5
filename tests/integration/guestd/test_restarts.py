"""Supervisors that start their agents again, for real, without a VM."""

import contextlib
import json
import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestd.configuration import Agent
from guestd.relay import FRAME, KEYS, SIZE
from guestd.state import State
from guestd.workload import take_lock
from guestd.workload.crew import Crew
from guestd.workload.files import EXITED, FAILED, RESTARTING, TIMED_OUT, AgentFiles, Record
from guestd.workload.supervisor import supervise
from tests.integration.guestd.bench import PATIENCE_S, UnlimitedCgroup, find_unified

pytestmark = [pytest.mark.root]

FIELDS = {
    "name": "a",
    "workdir": "/",
    "env": [],
    "timeout_s": 0,
    "grace_period_s": 1,
    "memory_mib": 64,
    "pids_max": 64,
    "output_max_bytes": 1000,
    "restart": "on-failure",
    "max_restarts": 0,
    "session": "",
}


class Supervised:
    """One agent in a supervisor's process of its own, as guestd starts it."""

    def __init__(self, folder: Path, cgroups: Path) -> None:
        self.state = State(str(folder / "guestd"), "a boot")
        self.files = AgentFiles(self.state.agent_folder("a"))
        self.files.prepare()
        self.nudges = self.state.open_nudges()
        self.cgroups = cgroups
        self.cgroup = UnlimitedCgroup(f"{cgroups}/agent-a")
        self.seen: list[dict[str, object]] = []
        self._pid = 0

    def start(self, script: str, **fields: object) -> None:
        self.agent = Agent({**FIELDS, "command": ["sh", "-c", script], **fields})
        lock = take_lock(self.files.lock)
        assert lock is not None
        self._pid = os.fork()
        if self._pid == 0:
            supervise(self.agent, self.files, self.cgroup, self.state.nudge_path)
            os._exit(0)
        os.close(lock)

    def until(self, *states: str) -> Record:
        """The record in one of these states; what was seen on the way is in `seen`."""
        poll = select.poll()
        poll.register(self.nudges, select.POLLIN)
        give_up_at_s = time.monotonic() + PATIENCE_S
        while (record := self.files.load_record()).state not in states:
            self._see(record)
            assert time.monotonic() < give_up_at_s, self.seen
            poll.poll(100)
            os.read(self.nudges, 1000) if poll.poll(0) else None
        self._see(record)
        return record

    def until_output(self, content: bytes) -> None:
        give_up_at_s = time.monotonic() + PATIENCE_S
        while content not in self.output():
            assert time.monotonic() < give_up_at_s, self.output()
            select.select([self.nudges], [], [], 0.1)

    def stop(self) -> None:
        control = os.open(self.files.control, os.O_RDWR | os.O_NONBLOCK)
        os.write(control, b"\n")
        os.close(control)

    def output(self) -> bytes:
        return Path(self.files.output).read_bytes()

    def kill_supervisor(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._pid = 0

    def close(self) -> None:
        self.cgroup.kill()
        if self._pid:
            self.stop()
            os.waitpid(self._pid, 0)
        self.cgroup.remove()
        windows = UnlimitedCgroup(f"{self.cgroups}/sessions")
        windows.kill()
        while not windows.remove():
            pass
        os.close(self.nudges)

    def _see(self, record: Record) -> None:
        if not self.seen or self.seen[-1] != record.describe():
            self.seen.append(record.describe())


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    """An agent that is to be started; nothing of it is left."""
    cgroups = find_unified() / f"bedplate-test-{os.getpid()}"
    cgroups.mkdir()
    Path("/run/bedplate").mkdir(exist_ok=True)
    made = Supervised(tmp_path, cgroups)
    yield made
    made.close()
    cgroups.rmdir()


def test_a_failure_is_started_again_and_a_success_is_not(supervised: Supervised) -> None:
    """Exit code 1 twice, then 0: three starts, one output, the pauses told with how the start before ended."""
    # Where the agent may write: pytest's own folder is root's.
    with tempfile.NamedTemporaryFile() as count:
        os.chmod(count.name, 0o666)  # noqa: PTH101 (the agent's user writes it)
        supervised.start(f"echo start; echo x >>{count.name}; [ $(wc -l <{count.name}) -ge 3 ]")
        record = supervised.until(EXITED)
    assert (record.exit_code, record.restarts, record.message) == (0, 2, "")
    assert supervised.output() == b"start\n" * 3
    resting = [seen for seen in supervised.seen if seen["state"] == RESTARTING]
    assert [(seen["exit_code"], seen["restarts"]) for seen in resting] == [(1, 1), (1, 2)]


def test_starts_are_used_up_and_that_is_said(supervised: Supervised) -> None:
    """The last failure stays the end, with its exit code."""
    supervised.start("echo start; exit 9", max_restarts=1)
    record = supervised.until(EXITED)
    assert (record.exit_code, record.restarts) == (9, 1)
    assert "started again 1 times, which is its most" in record.message
    assert supervised.output() == b"start\n" * 2


def test_a_stop_ends_the_pause(supervised: Supervised) -> None:
    """An agent that waits to be started again is stopped at once and keeps the exit code it had."""
    supervised.start("exit 5", restart="always")
    supervised.until(RESTARTING)
    supervised.stop()
    record = supervised.until(EXITED)
    assert (record.exit_code, record.restarts) == (5, 1)


def test_a_stopped_agent_is_not_started_again(supervised: Supervised) -> None:
    """TERM to one that would be restarted always is its end."""
    supervised.start("echo here; exec sleep 1000", restart="always")
    while supervised.output() != b"here\n":
        supervised.until("running")
    supervised.stop()
    record = supervised.until(EXITED, RESTARTING)
    assert (record.state, record.signal, record.restarts) == (EXITED, 15, 0)


def test_a_timeout_counts_over_all_starts(supervised: Supervised) -> None:
    """However often it is started again, its time runs out, also in a pause; then it is over."""
    supervised.start("exit 1", restart="always", timeout_s=2)
    record = supervised.until(TIMED_OUT)
    assert (record.exit_code, record.restarts >= 1) == (1, True)


def test_output_is_bounded_over_all_starts(supervised: Supervised) -> None:
    """The limit is the agent's, not each start's."""
    supervised.start("head -c 600 /dev/zero; exit 1", max_restarts=2)
    record = supervised.until(EXITED)
    assert (len(supervised.output()), record.cut, record.restarts) == (1000, "limit", 2)


def test_what_cannot_be_executed_is_not_tried_again(supervised: Supervised) -> None:
    """A program that is not there will not be there a second later."""
    supervised.start("", command=["/no/such/program"], restart="always")
    record = supervised.until(FAILED)
    assert (record.exit_code, record.restarts) == (127, 0)


def test_a_supervisor_killed_in_a_pause_is_an_end(supervised: Supervised) -> None:
    """guestd finds its lock free and no end: the agent is told as failed, and never started again."""
    supervised.start("exit 1", restart="always")
    supervised.until(RESTARTING)
    supervised.kill_supervisor()
    Crew([supervised.agent], supervised.state, str(supervised.cgroups)).ensure_started()
    record = supervised.files.load_record()
    assert (record.state, "supervisor was killed" in record.message) == (FAILED, True)
    assert json.loads(Path(supervised.files.record).read_bytes())["restarts"] == 1


def test_ignored_signals_are_no_agents(supervised: Supervised) -> None:
    """Whatever its parents ignore, an agent begins with every signal as the kernel has it: Ctrl-C reaches it."""
    supervised.start("grep SigIgn /proc/self/status", restart="no")
    supervised.until(EXITED)
    assert supervised.output() == b"SigIgn:\t0000000000000000\n"


def test_a_session_is_a_terminal_that_logs_exact_bytes(supervised: Supervised) -> None:
    """It has a size that a viewer can change, takes keys, answers Ctrl-C, and its log has the newlines that were written."""
    supervised.start(
        "trap 'echo int; exit 4' INT; tty; read x; echo got $x; stty size; sleep 1000 & wait",
        session="watch",
        restart="no",
    )
    with viewer() as seen:
        # What is typed earlier is echoed ahead of what it prints.
        supervised.until_output(b"/dev/pts/")
        seen.sendall(FRAME.pack(SIZE, 101, 33) + FRAME.pack(KEYS, 3, 0) + b"hi\n")
        supervised.until_output(b"33 101\n")
        seen.sendall(FRAME.pack(KEYS, 1, 0) + b"\x03")
        record = supervised.until(EXITED)
    assert record.exit_code == 4
    lines = supervised.output().split(b"\n")
    assert (lines[0][:9], lines[-2:]) == (b"/dev/pts/", [b"^Cint", b""])
    assert b"got hi" in lines
    assert b"\r" not in supervised.output()


def test_a_viewer_harms_nothing(supervised: Supervised) -> None:
    """Frames that make no sense and a viewer that reads nothing cost their connection only; the log is whole."""
    script = "read x; head -c 900 /dev/zero | tr '\\0' y; exit 0"
    supervised.start(script, session="watch", restart="no")
    with viewer() as silent, viewer() as wild:
        wild.sendall(b"\xff" * 100)
        assert wild.recv(1000) == b""
        silent.sendall(FRAME.pack(KEYS, 1, 0) + b"\n")
        assert supervised.until(EXITED).exit_code == 0
    assert supervised.output() == b"\n" + b"y" * 900


def test_a_session_goes_on_over_restarts(supervised: Supervised) -> None:
    """The same viewer sees the next start, on a terminal that is as it was at first."""
    supervised.start("stty raw; echo start; exit 1", session="watch", max_restarts=1)
    with viewer() as seen:
        record = supervised.until(EXITED)
        heard = b""
        while content := seen.recv(1000):
            heard += content
    assert (record.exit_code, record.restarts) == (1, 1)
    assert heard.count(b"start\n") == 2


@contextlib.contextmanager
def viewer() -> Iterator[socket.socket]:
    """A connection to the session `watch`, as the relay in its tmux window has one."""
    give_up_at_s = time.monotonic() + PATIENCE_S
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        while True:
            try:
                connection.connect("/run/bedplate/session-watch")
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < give_up_at_s
                continue
            break
        yield connection
