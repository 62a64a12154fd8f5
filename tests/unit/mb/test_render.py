"""What people see: within 80 columns, with everything that helps, and nothing of a guest's that steers a terminal."""

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fleet.model.host import (
    Accelerator,
    Capacity,
    Drain,
    Host,
    HostCordon,
    HostImage,
    HostLosses,
    HostRecord,
    NumaNode,
    Reservation,
    Straggler,
)
from fleet.model.ids import HostId, SandboxId, Tenant
from fleet.model.sandbox import AgentPhase, AgentStatus, Goal, Label, Phase, Reason, Stage
from mb.compare import FileDiff
from mb.render.diff import render_diff, render_stat
from mb.render.hosts import render_drain, render_hosts
from mb.render.output import OutputPrinter
from mb.render.progress import Progress, render_summary
from mb.render.sandbox import render_agent_end, render_listing, render_sandbox, to_json
from mb.render.text import WIDTH, clean, flow, render_age, render_table
from tests.unit.mb.build import DIGEST, NOW_MS, SANDBOX_ID, failed, pending, sandbox

LONG = "x" * 63
NASTY = Reason("agent_failed", "wrote \x1b]0;owned\x07 and \u202ereversed " + "words " * 40, "look at mb logs")


def fits(lines: list[str]) -> bool:
    return all(len(line) <= WIDTH and "\x1b" not in line and "\u202e" not in line for line in lines)


def test_a_listing_fits_and_is_newest_first() -> None:
    """Long names and hosts give way; the id stays whole, because one types it."""
    old = sandbox(created_at_ms=NOW_MS - 90_000_000)
    longest = replace(sandbox(host_id=HostId(LONG)), spec=replace(sandbox().spec, name=LONG))
    lines = render_listing([old, longest], NOW_MS + 65_000)
    assert fits(lines)
    assert lines[0].split() == ["NAME", "PHASE", "HOST", "EXIT", "AGE", "ID"]
    assert "65 s" in lines[1]
    assert "25 h" in lines[2]


def test_a_listing_of_ordinary_names_is_whole() -> None:
    """The usual case is not shortened, and says how agents ended."""
    (_, line) = render_listing([sandbox()], NOW_MS)
    assert line.split() == ["fix-tests", "completed", "rack1-07", "0", "0", "s", SANDBOX_ID]


def test_operators_see_whose_sandbox_it_is() -> None:
    """With several tenants the name carries the tenant."""
    lines = render_listing([sandbox(), sandbox(tenant=Tenant("other"))], NOW_MS)
    assert [line.split()[0] for line in lines[1:]] == ["lab/fix-tests", "other/fix-tests"]


def test_a_status_shows_everything() -> None:
    """Phase, host, accelerator, address, agents, stages with durations, changes."""
    text = "\n".join(render_sandbox(sandbox(), NOW_MS))
    for part in (
        "fix-tests",
        "completed",
        "rack1-07 (tcg)",
        "10.77.0.2",
        "exit 0",
        "image_verified",
        "0.80 s",
        "3 paths",
    ):
        assert part in text, part
    assert fits(render_sandbox(sandbox(), NOW_MS))


def test_a_later_run_counts_from_its_own_start() -> None:
    """How long the sandbox was stopped is no time that its start took."""
    one = sandbox(run=2, assigned_at_ms=NOW_MS + 900_000)
    assert one.status is not None
    later = replace(one.status, run=2, stages=(Stage("image_verified", NOW_MS + 900_500),))
    lines = render_sandbox(replace(one, status=later), NOW_MS)
    assert [line.split() for line in lines if " assigned " in line or "image_verified" in line] == [
        ["assigned", "0.00", "s", "0.00", "s"],
        ["image_verified", "0.50", "s", "0.50", "s"],
    ]


def test_a_pending_status_tells_why() -> None:
    """Refusal is shown with its counts and reasons."""
    lines = render_sandbox(pending(), NOW_MS)
    text = " ".join(" ".join(lines).split())
    assert "no room on 3 hosts: memory (2 hosts); vcpus (1 host)" in text
    assert "the most that one of them has free is 1024 MiB" in text
    assert fits(lines)


def test_a_reason_comes_with_its_next_step_and_harmless() -> None:
    """What a guest said is shown, and cannot steer the terminal."""
    lines = render_sandbox(failed(NASTY), NOW_MS)
    text = "\n".join(lines)
    assert "\\x1b]0;owned\\x07" in text
    assert "look at mb logs" in text
    assert fits(lines)
    assert fits(render_summary(failed(NASTY)))


def test_a_summary_says_what_to_do_next() -> None:
    """After a run: how it ended, where the time went, and the commands that go on."""
    lines = render_summary(sandbox())
    text = "\n".join(lines)
    for part in ("completed", "fixer completed, exit 0", "link_connected", "mb diff fix-tests", "mb destroy fix-tests"):
        assert part in text, part
    assert fits(lines)
    assert "mb diff" not in "\n".join(render_summary(failed(NASTY)))


def test_progress_says_each_thing_once() -> None:
    """A watch repeats the whole sandbox; the reader sees only what is new."""
    stream = io.StringIO()
    progress = Progress(stream, clock_s=iter([0.0] + [1.5] * 50).__next__)
    for _ in range(2):
        progress.show(pending())
    for _ in range(2):
        progress.show(sandbox(phase=Phase.RUNNING))
    lines = stream.getvalue().splitlines()
    assert len(lines) == len(set(lines))
    assert lines[0] == "[   1.5 s] pending: no room on 3 hosts: memory (2 hosts); vcpus (1 host)"
    assert "[   1.5 s] assigned to host rack1-07 (+0.20 s)" in lines
    assert lines[-1] == "[   1.5 s] agent fixer completed, exit 0"


def test_hosts_show_used_of_total() -> None:
    """An operator sees at a glance what is left."""
    record = HostRecord(
        HostId("rack1-07"),
        "10.0.0.7:7444",
        Capacity(64, 128 * 1024, 1024 * 1024, 50),
        (),
        (HostImage("base:latest", DIGEST),),
        Accelerator.TCG,
        "the probe guest did not boot on KVM " * 4,
        (),
        "0.1.0",
        NOW_MS,
    )
    host = Host(record, True, Reservation(HostId("rack1-07"), 4, 4608, 2048, 2))
    lines = render_hosts([host])
    assert lines[1].split() == ["rack1-07", "alive", "tcg", "4/64", "4.5/128", "2/1024", "2/50"]
    assert "base:latest" in lines[2]
    assert fits(lines)
    cordoned = replace(host, cordon=HostCordon(HostId("rack1-07"), "ops", NOW_MS, "a new disk " * 15))
    lines = render_hosts([cordoned])
    assert lines[1].split()[1] == "cordoned"
    assert "cordoned by ops: a new disk" in "\n".join(lines)
    assert fits(lines)
    assert render_hosts([replace(cordoned, is_alive=False)])[1].split()[1] == "away"


def test_hosts_show_what_else_to_know() -> None:
    """Overcommit, taints, NUMA nodes, losses and a drain each have a line that fits; a fenced, plain host has none."""
    host_id = HostId("rack1-07")
    plain = HostRecord(
        host_id,
        "10.0.0.7:7444",
        Capacity(64, 128 * 1024, 1024 * 1024, 50),
        (),
        (),
        Accelerator.KVM,
        "",
        (),
        "0.1.0",
        NOW_MS,
    )
    plain = replace(plain, is_fenced=True)
    host = Host(plain, True, Reservation(host_id))
    assert len(render_hosts([host])) == 2
    rich = replace(
        plain,
        is_fenced=False,
        vcpu_overcommit_milli=2500,
        taints=(Label("team", "ml"),),
        numa_nodes=(NumaNode(0, 32, 65536), NumaNode(1, 32, 65536)),
    )
    losses = HostLosses(host_id, (NOW_MS, NOW_MS), NOW_MS + 60_000)
    cordon = HostCordon(host_id, "ops", NOW_MS, is_draining=True, moves_max=2)
    lines = render_hosts([replace(host, record=rich, losses=losses, cordon=cordon)])
    text = "\n".join(lines)
    for words in (
        "2.5 vCPUs for each",
        "team=ml",
        "1: 32 vCPUs, 64 GiB",
        "keeps its VMs",
        "lost 2 times",
        "2 at a time",
    ):
        assert words in text
    assert lines[1].split()[1] == "draining"
    assert fits(lines)


def test_a_drain_says_how_far_it_is() -> None:
    """Left, moving, gone, and for each that stays why; at its end that nothing runs there."""
    host_id = HostId("rack1-07")
    record = HostRecord(
        host_id, "10.0.0.7:7444", Capacity(64, 131072, 1048576, 50), (), (), Accelerator.KVM, "", (), "0.1.0", NOW_MS
    )
    host = Host(record, True, Reservation(host_id))
    straggler = Straggler(SandboxId("aaaaaaaaaaaa"), Tenant("demo"), "fix-tests", "may_not_move", "it has begun " * 9)
    lines = render_drain(Drain(host, 3, 1, (straggler,)), 6)
    assert "3 left, 1 moving, 2 gone" in lines[0]
    assert "fix-tests of demo (may_not_move)" in "\n".join(lines)
    assert fits(lines)
    assert render_drain(Drain(host, 0, 0), 6) == ["rack1-07 is drained: nothing runs there; 6 left it"]
    assert render_drain(Drain(host, 0, 0)) == ["rack1-07 is drained: nothing runs there"]


def test_json_has_every_field() -> None:
    """Programs get what fleet.model has, enums as their words."""
    value = to_json(sandbox())
    assert (value["phase"], value["spec"]["name"], value["status"]["agents"][0]["exit_code"]) == (
        "completed",
        "fix-tests",
        0,
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("ümläut ✓", "ümläut ✓"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\u2028b", "a\\u2028b"),
        ("\x9b1m", "\\x9b1m"),
    ],
)
def test_clean_writes_out_what_steers(text: str, shown: str) -> None:
    """Escape sequences, C1 controls, separators and overrides lose their power, text keeps its look."""
    assert clean(text) == shown


@pytest.mark.parametrize(
    ("age_s", "shown"), [(0, "0 s"), (119, "119 s"), (120, "2 m"), (7200, "2 h"), (172_800, "2 d")]
)
def test_ages_are_one_unit(age_s: int, shown: str) -> None:
    """Short enough for a column; a clock that is behind gives no negative age."""
    assert render_age(NOW_MS, NOW_MS + age_s * 1000) == shown
    assert render_age(NOW_MS + 5000, NOW_MS) == "0 s"


def test_a_table_never_leaves_the_screen() -> None:
    """However long the cells are."""
    assert fits(render_table(("A", "B"), [("x" * 200, "y" * 200)]))


class Terminal(io.StringIO):
    """A terminal, as far as a program can ask."""

    def isatty(self) -> bool:
        return True


class Pipe(io.TextIOWrapper):
    """A pipe whose bytes can be read."""

    def __init__(self) -> None:
        self.raw_bytes = io.BytesIO()
        super().__init__(self.raw_bytes)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Somewhere that is no terminal."""
    with Pipe() as opened:
        yield opened


def test_output_into_a_pipe_is_exact(pipe: Pipe) -> None:
    """Every byte, also those that are no text."""
    OutputPrinter(pipe, prefix=False).write("a", b"\x1b[1m\xff\r\n")
    assert pipe.raw_bytes.getvalue() == b"\x1b[1m\xff\r\n"


def test_output_on_a_terminal_is_harmless() -> None:
    """Also when a character comes in two pieces."""
    terminal = Terminal()
    printer = OutputPrinter(terminal, prefix=False)
    for payload in (b"\x1b[2Jx\xc3", b"\xbc\rhidden\n"):
        printer.write("a", payload)
    assert terminal.getvalue() == "\\x1b[2Jxühidden\n"


def test_lines_of_several_agents_are_told_apart(pipe: Pipe) -> None:
    """Each line is printed whole, behind its agent's name; the last one also without a newline."""
    printer = OutputPrinter(pipe, prefix=True)
    for agent, payload in (("a", b"one\ntw"), ("b", b"1\n"), ("a", b"o\n"), ("b", b"2")):
        printer.write(agent, payload)
    printer.finish("a")
    printer.finish("b")
    assert pipe.raw_bytes.getvalue() == b"a | one\nb | 1\na | two\nb | 2\n"


def test_a_diff_is_coloured_only_where_it_may_be() -> None:
    """Exact for `git apply`, cleaned for a terminal, coloured only there."""
    fields: dict[str, Any] = {"path": "a", "kind": "modified", "insertions": 1, "deletions": 0, "remark": ""}
    diff = FileDiff(**fields, lines=("+\x1b[31m",))
    assert list(render_diff([diff], is_terminal=False, is_coloured=False)) == ["+\x1b[31m"]
    assert list(render_diff([diff], is_terminal=True, is_coloured=False)) == ["+\\x1b[31m"]
    assert list(render_diff([diff], is_terminal=True, is_coloured=True)) == ["\x1b[32m+\\x1b[31m\x1b[0m"]
    assert render_stat([diff])[-1] == "1 path, +1 -0"


def test_an_agent_that_the_owner_stopped_has_not_failed() -> None:
    """TERM and KILL of mb stop are told as such; another signal, or another goal, is a failure."""
    agent = AgentStatus("fixer", AgentPhase.FAILED, signal=15, restarts=2)
    stopped = sandbox(phase=Phase.STOPPED, goal=Goal.STOP)
    assert render_agent_end(agent, stopped) == "stopped, killed by signal 15, restarted 2 times"
    assert render_agent_end(agent, sandbox()).startswith("failed, killed by signal 15")
    assert render_agent_end(replace(agent, signal=11), stopped).startswith("failed")


def test_what_is_unusual_about_a_run_is_listed() -> None:
    """Restarts, the number of the run, and why a running sandbox is not well; with the sandbox's own name in the next step."""
    one = sandbox(phase=Phase.RUNNING, run=3)
    assert one.status is not None
    (agent,) = one.status.agents
    reason = Reason("guest_unresponsive", "nothing was heard of it for 60 s", "wait, or mb stop NAME")
    status = replace(one.status, reason=reason, agents=(replace(agent, restarts=2),))
    lines = render_listing([replace(one, status=status)], NOW_MS)
    assert "running (guest_unresponsive)" in lines[1]
    assert (
        "running, 2 restarts, run 3" in render_listing([replace(one, status=replace(status, reason=None))], NOW_MS)[1]
    )
    shown = render_sandbox(replace(one, status=status), NOW_MS)
    assert "wait, or mb stop fix-tests" in "\n".join(shown)
    assert any(line.split()[:2] == ["run", "3,"] for line in shown)
    assert fits(lines)
    assert fits(shown)


def test_errors_keep_paths_whole() -> None:
    """Words are wrapped at 80 columns; what one copies, such as a path, is not cut in two."""
    path = "/a" * 60
    lines = flow("error: ", f"there is no {path} here")
    assert [len(line) <= WIDTH for line in lines] == [True, False, True]
    assert lines[1].strip() == path
