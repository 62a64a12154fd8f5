"""Programs run by hand, for real, without a VM: streams, terminals, signals, windows, ends."""

import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestd.execs import sweep_programs
from guestd.link import Message
from tests.integration.guestd.bench import WINDOW_BYTES, Bench, find_unified

pytestmark = [pytest.mark.root]

TERMINAL = {"columns": 80, "rows": 24, "term": "xterm"}
MUCH_BYTES = 10_000_000
FRAME_BYTES_MAX = 64 * 1024


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Programs in a cgroup of this test's own; nothing of them is left."""
    # Not by the process's id: runs in namespaces of their own share the machine's cgroups, and have the same ids.
    cgroups = Path(tempfile.mkdtemp(prefix="bedplate-test-", dir=find_unified()))
    made = Bench(cgroups)
    yield made
    made.close()


def ended(exit_code: int | None, signal: int | None = None, message: str = "") -> dict[str, object]:
    return {"exit_code": exit_code, "signal": signal, "message": message}


def test_streams_are_apart_and_the_exit_code_is_the_programs(bench: Bench) -> None:
    """stdout, stderr and the code arrive, the end last of all; `exec-started` comes first."""
    bench.run(7, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert bench.end_of(7) == ended(3)
    assert (bench.output(7), bench.output(7, "stderr")) == (b"out\n", b"err\n")
    types = [message.type for message in bench.heard]
    assert (types[0], types[-1]) == ("exec-started", "exec-ended")


def test_a_program_is_an_agent_or_root_and_nothing_more(bench: Bench) -> None:
    """The user's ids, no groups, no privilege to gain, no core, no ignored signal, no descriptor of guestd's."""
    script = "id -u; id -G; ulimit -c; grep -E 'NoNewPrivs|SigIgn' /proc/self/status; ls /proc/$$/fd | tr '\\n' ' '"
    bench.run(1, "sh", "-c", script)
    bench.run(2, "sh", "-c", "id -u; grep NoNewPrivs /proc/self/status", user="root")
    assert (bench.end_of(1), bench.end_of(2)) == (ended(0), ended(0))
    lines = bench.output(1).decode().splitlines()
    assert lines == ["1001", "1001", "0", "SigIgn:\t0000000000000000", "NoNewPrivs:\t1", "0 1 2 "]
    assert bench.output(2).decode().splitlines() == ["0", "NoNewPrivs:\t0"]


def test_an_environment_is_the_users_base_and_what_is_asked_for(bench: Bench) -> None:
    """Nothing of guestd's own; the path of each secret, never its value; the terminal's kind."""
    bench.run(1, "env", env=[["X", "a b"]], terminal=TERMINAL)
    bench.run(2, "env", user="root")
    bench.end_of(1)
    bench.end_of(2)
    assert sorted(bench.output(1).decode().split("\r\n")[:-1]) == [
        "HOME=/home/agent",
        "LANG=C.UTF-8",
        "LOGNAME=agent",
        "PATH=/usr/local/bin:/usr/bin:/bin",
        "SHELL=/bin/bash",
        "TERM=xterm",
        "TOKEN_FILE=/run/secrets/TOKEN",
        "USER=agent",
        "X=a b",
    ]
    assert "HOME=/root" in bench.output(2).decode().splitlines()


@pytest.mark.parametrize(
    ("command", "fields", "code", "words"),
    [
        (["no-such-program"], {}, 127, "its program no-such-program cannot be executed: No such file"),
        (["/etc/passwd"], {}, 126, "its program /etc/passwd cannot be executed: Permission denied"),
        (["true"], {"workdir": "/not/there"}, 126, "its working directory /not/there cannot be entered: No such file"),
        (["true\0"], {}, 126, "embedded null"),
        (["x" * 9000], {}, 126, "File name too long"),
    ],
)
def test_what_cannot_be_run_is_explained(
    bench: Bench, command: list[str], fields: dict[str, object], code: int, words: str
) -> None:
    """The shell's exit code and a sentence, as agents have them."""
    bench.run(1, *command, **fields)
    found = bench.end_of(1)
    assert (found["exit_code"], found["signal"]) == (code, None)
    assert words in str(found["message"])


def test_input_goes_round_whole(bench: Bench) -> None:
    """Ten megabytes through a program come back equal, each way within its window, and all of it is acknowledged."""
    content = os.urandom(MUCH_BYTES)
    bench.run(1, "cat")
    bench.feed(1, content)
    assert bench.end_of(1) == ended(0)
    assert bench.output(1) == content
    assert bench.taken(1) == MUCH_BYTES
    assert max(len(message.payload) for message in bench.heard) <= FRAME_BYTES_MAX


def test_output_stops_at_its_window(bench: Bench) -> None:
    """A client that takes nothing holds the program up and costs guestd nothing; each byte it takes lets one more through."""
    bench.is_acking = False
    bench.run(1, "cat", "/dev/zero")
    bench.until(lambda: len(bench.output(1)) >= WINDOW_BYTES)
    for _ in range(5):
        bench.turn()
    assert len(bench.output(1)) == WINDOW_BYTES
    bench.say("exec-ack", exec=1, bytes=1000)
    bench.until(lambda: len(bench.output(1)) > WINDOW_BYTES)
    assert len(bench.output(1)) == WINDOW_BYTES + 1000


def test_input_past_its_window_ends_the_session(bench: Bench) -> None:
    """A host that breaks the window broke the protocol; guestd keeps no more than the window."""
    bench.run(1, "sleep", "1000")
    # Four fill the window, and a pipe takes one more.
    for _ in range(4):
        bench.say("exec-input", bytes(FRAME_BYTES_MAX), exec=1, end=False)
    bench.say("exec-input", bytes(FRAME_BYTES_MAX // 2), exec=1, end=False)
    with pytest.raises(ValueError, match="window"):
        bench.say("exec-input", bytes(FRAME_BYTES_MAX), exec=1, end=False)


def test_input_that_nobody_reads_is_dropped(bench: Bench) -> None:
    """A program that has closed its stdin takes all input, and the host is not held up."""
    bench.run(1, "sh", "-c", "exec <&-; echo closed; sleep 1000")
    bench.until(lambda: bench.output(1) == b"closed\n")
    bench.feed(1, bytes(1_000_000))
    bench.until(lambda: bench.taken(1) == 1_000_000)
    bench.say("exec-signal", exec=1, signal=9)
    assert bench.end_of(1) == ended(None, 9)


def test_a_port_that_takes_nothing_bounds_what_is_kept(bench: Bench) -> None:
    """However many programs print while the host reads nothing, guestd holds a few frames."""
    bench.is_port_open = bench.is_acking = False
    for number in range(1, 9):
        bench.run(number, "cat", "/dev/zero")
    for _ in range(30):
        bench.turn()
    assert not bench.outbox.has_urgent_room
    assert bench.outbox._urgent_bytes < 9 * WINDOW_BYTES / 2


def test_a_terminal_answers_a_resize_and_an_interrupt(bench: Bench) -> None:
    """It has the size it was given, tells its program of another, and Ctrl-C interrupts what is in the foreground."""
    script = "trap 'stty size' WINCH; trap 'echo interrupted' INT; stty size; tty; while :; do read -r x && echo got $x; done"
    bench.run(1, "bash", "-c", script, terminal=TERMINAL)
    bench.until(lambda: b"/dev/pts/" in bench.output(1))
    assert bench.output(1).startswith(b"24 80\r\n")
    bench.say("exec-resize", exec=1, columns=132, rows=50)
    bench.say("exec-input", b"x\n", exec=1, end=False)
    bench.until(lambda: b"50 132\r\n" in bench.output(1) and b"got x\r\n" in bench.output(1))
    bench.say("exec-input", b"\x03", exec=1, end=False)
    bench.until(lambda: b"interrupted\r\n" in bench.output(1))


def test_ctrl_c_ends_a_program_and_its_end_is_told(bench: Bench) -> None:
    """What does not trap the interrupt dies of it: nothing here ignores signals."""
    bench.run(1, "sleep", "1000", terminal=TERMINAL)
    bench.until(lambda: bench.heard != [])
    bench.run(2, "sh", "-c", f"until grep -qs sleep {bench.cgroups}/exec-*/cgroup.procs /proc/*/comm; do :; done")
    bench.end_of(2)
    bench.say("exec-input", b"\x03", exec=1, end=False)
    assert bench.end_of(1) == ended(None, 2)


def test_the_end_of_input_on_a_terminal_is_ctrl_d(bench: Bench) -> None:
    """A reader that waits for the end of its terminal gets it."""
    bench.run(1, "cat", terminal=TERMINAL)
    bench.say("exec-input", b"line\n", exec=1, end=True)
    assert bench.end_of(1) == ended(0)
    assert b"line\r\n" in bench.output(1)


def test_a_signal_reaches_the_group(bench: Bench) -> None:
    """The program and its children hear it; it may choose its own exit code."""
    bench.run(1, "sh", "-c", "trap 'echo heard; exit 7' USR1; echo here; sleep 1000 & wait")
    bench.until(lambda: bench.output(1) == b"here\n")
    bench.say("exec-signal", exec=1, signal=10)
    assert bench.end_of(1) == ended(7)
    assert bench.output(1) == b"here\nheard\n"


def test_nothing_outlives_a_program(bench: Bench) -> None:
    """What it leaves in the background is killed, also when that holds its output open and ignores signals."""
    bench.run(1, "sh", "-c", "(trap '' HUP TERM; exec sleep 1000) & echo left")
    bench.run(2, "sh", "-c", "(exec sleep 1000 >/dev/null 2>&1) & echo left")
    assert (bench.end_of(1), bench.end_of(2)) == (ended(0), ended(0))
    assert (bench.output(1), bench.output(2)) == (b"left\n", b"left\n")
    bench.until(lambda: all((path / "cgroup.procs").read_text() == "" for path in running(bench)))


def test_a_client_that_is_gone_takes_its_program_along(bench: Bench) -> None:
    """HUP first, KILL for who ignores it; the end is told, so that the host knows the place is free."""
    bench.run(1, "sh", "-c", "trap '' HUP; echo here; while :; do sleep 1000; done")
    bench.until(lambda: bench.output(1) == b"here\n")
    bench.say("exec-close", exec=1)
    assert bench.end_of(1) == ended(None, 9)


def test_a_session_that_ends_takes_its_programs_along_silently(bench: Bench) -> None:
    """After a hang-up nothing is said of them, and their ids mean nothing."""
    bench.run(1, "sleep", "1000")
    bench.until(lambda: bool(bench.heard))
    bench.execs.hang_up()
    bench.until(lambda: not bench.execs._abandoned)
    bench.say("exec-input", b"x", exec=1, end=False)
    assert [message.type for message in bench.heard] == ["exec-started"]


def test_sixteen_at_once_and_one_more_is_refused(bench: Bench) -> None:
    """The seventeenth is told why; when one has ended there is room again."""
    for number in range(1, 18):
        bench.run(number, "cat")
    assert bench.end_of(17) == ended(126, None, "16 programs run already")
    bench.say("exec-input", exec=1, end=True)
    assert bench.end_of(1) == ended(0)
    bench.run(18, "true")
    assert bench.end_of(18) == ended(0)


def test_a_program_has_a_bounded_cgroup_of_its_own(bench: Bench) -> None:
    """512 processes at most, and no other program in it."""
    bench.run(1, "sh", "-c", "cat /proc/self/cgroup; cat /proc/self/oom_score_adj; sleep 1000")
    bench.run(2, "sh", "-c", "cat /proc/self/cgroup; sleep 1000")
    bench.until(lambda: bench.output(1).endswith(b"500\n") and bench.output(2).endswith(b"\n"))
    mine, other = (bench.output(number).decode().splitlines()[-2 + number - 1] for number in (1, 2))
    assert mine != other
    assert bench.cgroups.name in mine + other
    assert {program.cgroup.limits for program in bench.execs._all()} == {(512, 0)}  # type: ignore[attr-defined]


def test_a_guest_that_cannot_fork_collects_no_cgroups(bench: Bench) -> None:
    """Whatever is missing for the next program's child is tried for again and again, and leaves nothing behind each time."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        for _ in range(20):
            bench.execs.rest()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(list(bench.cgroups.glob("exec-*"))) <= 1
    bench.run(1, "true")
    assert bench.end_of(1) == ended(0)


def test_a_closed_guest_runs_nothing(bench: Bench) -> None:
    """Once the guest is collected its programs are gone and another is refused."""
    bench.run(1, "sleep", "1000")
    bench.until(lambda: bool(bench.heard))
    bench.execs.close()
    assert bench.end_of(1) == ended(None, 9)
    bench.run(2, "true")
    assert bench.end_of(2) == ended(126, None, "this guest runs no programs now")


@pytest.mark.parametrize(
    ("type_", "fields"),
    [
        ("exec", {"exec": 1, "command": []}),
        ("exec", {"exec": 1, "command": ["true"], "user": "admin"}),
        ("exec", {"exec": -1, "command": ["true"]}),
        ("exec", {"exec": True, "command": ["true"]}),
        ("exec", {"exec": 1, "command": ["true"], "terminal": {"columns": 80}}),
        ("exec", {"exec": 1, "command": ["true"], "terminal": {"columns": 1 << 20, "rows": 1, "term": ""}}),
        ("exec", {"exec": 1, "command": ["true"], "env": ["x"]}),
        ("exec", {"exec": 9, "command": ["true"]}),
        ("exec-input", {"end": False}),
        ("exec-resize", {"exec": 9, "columns": -1, "rows": 1}),
        ("exec-signal", {"exec": 9, "signal": 65}),
        ("exec-ack", {"exec": 9, "bytes": "x"}),
    ],
)
def test_a_field_that_is_wrong_is_no_crash(bench: Bench, type_: str, fields: dict[str, object]) -> None:
    """guestd's loop takes each of these for a host that makes no sense; nothing is started by it."""
    bench.run(9, "sleep", "1000", terminal=TERMINAL)
    with pytest.raises((KeyError, TypeError, ValueError)):
        bench.say(type_, **fields)
    assert list(bench.execs._programs) == [9]


def test_payloads_are_base64_and_nothing_else(bench: Bench) -> None:
    """Raw bytes could hold the link's marker: they are refused."""
    bench.run(1, "cat")
    with pytest.raises(ValueError, match=r"."):
        bench.execs.handlers["exec-input"](Message("exec-input", {"exec": 1, "end": False}, b"\x00BEDPLATE"))


def test_a_guestd_that_was_killed_leaves_no_program(bench: Bench) -> None:
    """The next one ends what it finds: nobody listens to it any more. A spare ends with the guestd it waited for."""
    bench.run(1, "sh", "-c", "trap '' HUP TERM; echo here; while :; do sleep 1000; done")
    bench.until(lambda: bench.output(1) == b"here\n")
    sweep_programs(str(bench.cgroups))
    assert bench.end_of(1) == ended(None, 9)


def running(bench: Bench) -> list[Path]:
    """The cgroups of programs, without the spare child's."""
    spare = bench.execs._spare.cgroup.path if bench.execs._spare else ""
    return [path for path in bench.cgroups.glob("exec-*") if str(path) != spare]
