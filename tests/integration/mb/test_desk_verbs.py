"""Verbs about running and ended sandboxes as processes of their own, against the API over real gRPC."""

import asyncio
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.model.egress import NetworkEvent, NetworkEventKind
from fleet.model.event import Event
from fleet.model.ids import HostId, Tenant
from fleet.model.sandbox import AgentPhase, Phase, Reason
from fleet.model.usage import SandboxUsage
from mb.exits import Exit
from tests.integration.mb.desk import Desk
from tests.integration.mb.parts import Mb, end_of
from tests.unit.mb.build import NOW_MS, SANDBOX_ID, sandbox

NAME = "fix-tests"
JCARD = """
name = "fix-tests"
[secrets]
TOKEN = "hush-hush"
[agent]
harness = "custom"
command = ["run"]
"""


@pytest.fixture
def jcard(tmp_path: Path) -> Path:
    """A jcard with a secret."""
    folder = tmp_path / "card"
    folder.mkdir()
    (folder / "jcard.toml").write_text(JCARD)
    return folder


def with_secrets(desk: Desk, phase: Phase, *, awaited: bool = False) -> None:
    """A sandbox that has a secret, and waits for it if `awaited`."""
    one = sandbox(phase=phase)
    assert one.status is not None
    reason = Reason("secrets_awaited", "it waits for TOKEN", "mb secret send") if awaited else None
    status = replace(one.status, phase=phase, reason=reason, artifact=None)
    desk.put(replace(one, spec=replace(one.spec, secrets=("TOKEN",)), status=status))


async def test_stop_of_an_ended_sandbox_says_so(line: Mb, desk: Desk) -> None:
    """Nothing changes, and the user hears it."""
    desk.put(sandbox(phase=Phase.COMPLETED))
    assert "has ended already (completed); nothing changes" in (await line.run("stop", NAME)).stdout
    desk.put(sandbox(phase=Phase.RUNNING))
    assert "is asked to stop" in (await line.run("stop", NAME)).stdout


async def test_stop_waits_until_a_start_is_possible(line: Mb, desk: Desk) -> None:
    """With --wait mb returns when the host has let go of it, not when its phase says stopped."""
    one = sandbox(phase=Phase.RUNNING)
    assert one.status is not None
    desk.put(one)
    process = await line.start("stop", NAME, "--wait")
    await desk.until(lambda: ("stop", NAME) in desk.asked)
    desk.put(replace(one, phase=Phase.STOPPED, status=replace(one.status, phase=Phase.STOPPED, released=False)))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.wait(), 0.5)
    desk.put(replace(one, phase=Phase.STOPPED, status=replace(one.status, phase=Phase.STOPPED, released=True)))
    ended = await end_of(process)
    assert (ended.code, ended.stdout) == (0, f"{NAME} is stopped\n")


async def test_start_of_what_is_not_stopped(line: Mb, desk: Desk) -> None:
    """The scheduler's refusal, with its next step; a stopped one starts."""
    desk.put(sandbox(phase=Phase.RUNNING))
    refused = await line.run("start", NAME, "--json")
    assert (refused.code, refused.error()["code"]) == (Exit.ERROR, "not_stopped")
    desk.put(sandbox(phase=Phase.STOPPED))
    assert f"mb logs {NAME} --follow" in (await line.run("start", NAME)).stdout
    assert desk.asked == [("start", NAME)]


async def test_a_running_sandbox_is_not_asked_for_secrets(line: Mb, desk: Desk) -> None:
    """A start of what runs is refused as that, not for want of a jcard."""
    with_secrets(desk, Phase.RUNNING)
    refused = await line.run("start", NAME, "--json")
    assert (refused.code, refused.error()["code"]) == (Exit.ERROR, "not_stopped")


async def test_stop_of_what_had_no_host(line: Mb, desk: Desk) -> None:
    """It is stopped by that alone, which is not "nothing changes"."""
    desk.put(replace(sandbox(phase=Phase.STOPPED), host_id="", status=None))
    assert (await line.run("stop", NAME)).stdout == f"{NAME} is stopped; it had no host yet\n"


async def test_start_sends_the_secrets_again(line: Mb, desk: Desk, jcard: Path) -> None:
    """Without a jcard nothing is started; with one the values go when they are asked for, and are printed nowhere."""
    with_secrets(desk, Phase.STOPPED)
    refused = await line.run("start", NAME)
    assert (refused.code, desk.asked) == (Exit.INVALID, [])
    assert f"mb start {NAME} PATH" in refused.stderr
    process = await line.start("start", NAME, jcard)
    await desk.until(lambda: desk.asked)
    assert desk.secrets == []
    with_secrets(desk, Phase.STARTING, awaited=True)
    ended = await end_of(process)
    assert (ended.code, desk.secrets) == (0, [{"TOKEN": b"hush-hush"}])
    assert "hush" not in ended.stdout + ended.stderr


async def test_secrets_are_sent_by_hand(line: Mb, desk: Desk, jcard: Path) -> None:
    """From the jcard named; one without the value is told by name and field."""
    with_secrets(desk, Phase.STARTING, awaited=True)
    assert (await line.run("secret", "send", NAME, jcard)).code == 0
    assert desk.secrets == [{"TOKEN": b"hush-hush"}]
    (jcard / "jcard.toml").write_text(JCARD.replace("TOKEN", "OTHER"))
    refused = await line.run("secret", "send", NAME, jcard, "--json")
    assert (refused.code, refused.error()["code"]) == (Exit.INVALID, "secret_missing")


async def test_wait_exits_as_up_does(line: Mb, desk: Desk) -> None:
    """0 for completed, 3 for another end, 124 when it took too long."""
    desk.put(sandbox(phase=Phase.RUNNING))
    late = await line.run("wait", NAME, "--timeout", "100ms")
    assert (late.code, "runs on" in late.stderr) == (Exit.TIMED_OUT, True)
    process = await line.start("wait", NAME)
    desk.put(sandbox(phase=Phase.COMPLETED))
    assert (await end_of(process)).code == Exit.OK
    desk.put(sandbox(phase=Phase.STOPPED))
    assert (await line.run("wait", NAME, "--json")).code == Exit.ENDED_BADLY


async def test_several_are_removed_at_once(line: Mb, desk: Desk) -> None:
    """All that can be are; the first that cannot makes the exit code."""
    desk.put(sandbox(phase=Phase.COMPLETED))
    ended = await line.run("rm", NAME, "nobody")
    assert (ended.code, ended.stdout) == (Exit.ERROR, f"{NAME} is removed\n")
    assert "nobody" in ended.stderr
    assert desk.sandboxes == {}


async def test_down_is_the_reverse_of_up(line: Mb, desk: Desk, jcard: Path) -> None:
    """The sandbox of the jcard at a path, or one by name; of a jcard its name is enough: no secret, nothing about agents.

    A folder without a jcard is an error.
    """
    desk.put(sandbox(phase=Phase.COMPLETED))
    assert (await line.run("down", jcard)).stdout == f"{NAME} is removed\n"
    desk.put(sandbox(phase=Phase.COMPLETED))
    assert (await line.run("down", NAME)).stdout == f"{NAME} is removed\n"
    desk.put(sandbox(phase=Phase.COMPLETED))
    text = (jcard / "jcard.toml").read_text().replace("hush-hush", "${NOT_SET_HERE}")
    (jcard / "jcard.toml").write_text(text + "replicas = 3\nmemory = 7\n")
    assert (await line.run("down", jcard)).stdout == f"{NAME} is removed\n"
    missing = await line.run("down", jcard.parent)
    assert "jcard.toml" in "".join(missing.stderr.split())
    assert missing.code != 0


def event(seq: int, at_ms: int = NOW_MS, origin: str = "scheduler") -> Event:
    return Event(
        SANDBOX_ID, Tenant("lab"), origin, seq, at_ms, "tenant/lab", "sandbox.stopped", "stop", "running", "stopped"
    )


async def test_events_are_shown_and_followed(line: Mb, desk: Desk) -> None:
    """For people with time, change, actor and cause within 80 columns; for programs a list, or one object a line."""
    desk.record(event(1))
    shown = (await line.run("events", NAME)).stdout
    for part in ("2023-11-14T22:13:20.000Z", "sandbox.stopped running -> stopped", "by tenant/lab", "(stop)"):
        assert part in " ".join(shown.split()), part
    assert all(len(text) <= 80 for text in shown.splitlines())
    assert [one["seq"] for one in (await line.run("events", "--json")).value()] == [1]
    process = await line.start("events", "--follow", "--json")
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["seq"] == 1
    desk.record(event(2))
    assert json.loads(await process.stdout.readline())["seq"] == 2
    process.send_signal(signal.SIGINT)
    assert (await end_of(process)).code == Exit.INTERRUPTED
    assert (await line.run("events", "--since", "1h", "--json")).value() == []
    assert (await line.run("events", "--since", "1h")).stdout == "no events since 1h\n"
    wrong = await line.run("events", "--since", "yesterday")
    assert (wrong.code, "--since" in wrong.stderr) == (Exit.INVALID, True)


async def test_followed_events_of_one_sandbox_end_with_it(line: Mb, desk: Desk) -> None:
    """Its removal is the last that is told, each event once, and then mb ends: nothing can follow."""
    desk.record(event(1))
    process = await line.start("events", NAME, "--follow", "--json")
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["seq"] == 1
    desk.record(replace(event(2), kind="sandbox.removed"))
    ended = await end_of(process)
    assert (ended.code, [json.loads(text)["seq"] for text in ended.stdout.splitlines()]) == (0, [2])


async def test_a_network_log_is_shown_and_followed(line: Mb, desk: Desk) -> None:
    """For people verdict, number and cause within 80 columns; for programs each event once, through a stream that breaks."""
    denied = NetworkEvent(
        SANDBOX_ID, Tenant("demo"), 1, NOW_MS, NetworkEventKind.FRAMES, is_denied=True, reason="closed", count=3
    )
    passed = NetworkEvent(
        SANDBOX_ID, Tenant("demo"), 2, NOW_MS, NetworkEventKind.DNS, protocol="dns", name="api.example.com"
    )
    desk.network = [denied, passed]
    desk.put(sandbox(phase=Phase.RUNNING))
    shown = (await line.run("network", "log", NAME)).stdout
    words = " ".join(shown.split())
    for part in ("denied 3 frames of a sandbox that may send none (closed)", "allowed dns dns api.example.com"):
        assert part in words, part
    assert all(len(text) <= 80 for text in shown.splitlines())
    listed = (await line.run("network", "log", NAME, "--denied", "--json")).value()
    assert [(one["seq"], one["is_denied"], one["count"]) for one in listed] == [(1, True, 3)]
    desk.breaks = 1
    ended = await line.run("network", "log", NAME, "--follow", "--json")
    assert (ended.code, [json.loads(text)["seq"] for text in ended.stdout.splitlines()]) == (0, [1, 2])
    desk.network = []
    assert (await line.run("network", "log", NAME, "--denied")).stdout == "nothing was denied\n"


async def test_what_a_sandbox_may_reach_is_shown(line: Mb, desk: Desk) -> None:
    """The mode in words, within 80 columns; for programs all of the network, with the same digest."""
    desk.put(sandbox(phase=Phase.RUNNING))
    shown = (await line.run("network", "show", NAME)).stdout.splitlines()
    told = (await line.run("network", "show", NAME, "--json")).value()
    assert shown == ["mode    closed: nothing leaves the sandbox, and nothing reaches it", f"digest  {told['digest']}"]
    assert all(len(text) <= 80 for text in shown)
    assert (told["mode"], told["egress_allow"], told["sandbox_id"]) == ("closed", [], SANDBOX_ID)


async def test_top_measures_between_two_looks(line: Mb, desk: Desk) -> None:
    """CPU is the difference over the time that passed; hosts that did not answer are told."""
    desk.put(sandbox(phase=Phase.RUNNING))
    first = SandboxUsage(SANDBOX_ID, HostId("rack1-07"), NOW_MS, 1000, 300, 120, 64, NOW_MS)
    desk.usages = [[first], [replace(first, at_ms=NOW_MS + 2000, cpu_ms=2500)]]
    desk.unreached = ["rack9"]
    ended = await line.run("top")
    assert ended.stdout.splitlines()[1].split()[:7] == [NAME, "rack1-07", "75", "120", "MiB", "300", "MiB"]
    assert "rack9" in ended.stderr
    assert (await line.run("top", "--json")).value()["unreached_hosts"] == ["rack9"]


async def test_logs_tell_a_cut_and_name_the_agent(line: Mb, desk: Desk) -> None:
    """The only agent's name is in the object, and what is missing is told apart: its limit, or a full disk."""
    one = sandbox()
    assert one.status is not None
    (agent,) = one.status.agents
    desk.print("fixer", b"a\nb\nc\n", end=True)
    for output_bytes, words in ((64 * 1024 * 1024, "at its limit"), (2048, "its disk was full")):
        cut = replace(agent, output_truncated=True, output_bytes=output_bytes)
        desk.put(replace(one, status=replace(one.status, agents=(cut,))))
        ended = await line.run("logs", NAME, "--tail", "2", "--json")
        assert ended.value() == {"agent": "fixer", "offset": 2, "next_offset": 6, "text": "b\nc\n"}
        assert words in " ".join(ended.stderr.split())
    await line.run("logs", NAME, "--since", "2026-01-31T09:30:00Z")
    assert desk.opened[-1].since_ms == 1_769_851_800_000


async def test_followed_logs_end_when_the_changes_are_there(line: Mb, desk: Desk) -> None:
    """`mb logs --follow && mb diff` finds the artifact: the end of the output is not the end of the wait."""
    one = sandbox(phase=Phase.RUNNING)
    assert one.status is not None
    running = replace(one.status, artifact=None, phase=Phase.RUNNING)
    desk.put(replace(one, status=running))
    desk.print("fixer", b"\xc3", end=False)
    process = await line.start("logs", NAME, "--follow", "--json")
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["next_offset"] == 1
    desk.print("fixer", b"\xbc\n", end=True)
    assert json.loads(await process.stdout.readline()) == {
        "agent": "fixer",
        "offset": 1,
        "next_offset": 3,
        "text": "ü\n",
    }
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.wait(), 0.5)
    desk.put(one)
    assert (await end_of(process)).code == 0


async def test_another_agents_work_is_not_waited_for(line: Mb, desk: Desk) -> None:
    """The end of one of several agents is enough."""
    one = sandbox(phase=Phase.RUNNING)
    assert one.status is not None
    (agent,) = one.status.agents
    other = replace(agent, name="other", phase=AgentPhase.RUNNING, exit_code=None)
    desk.put(replace(one, status=replace(one.status, artifact=None, agents=(agent, other))))
    desk.print("fixer", b"done\n", end=True)
    ended = await line.run("logs", NAME, "fixer", "--follow")
    assert (ended.code, ended.stdout) == (0, "done\n")


def with_two_agents(desk: Desk) -> None:
    """A sandbox whose agents have printed and ended."""
    one = sandbox()
    assert one.status is not None
    spec = replace(one.spec, agents=(one.spec.agents[0], replace(one.spec.agents[0], name="tester")))
    status = replace(one.status, agents=(one.status.agents[0], replace(one.status.agents[0], name="tester")))
    desk.put(replace(one, spec=spec, status=status))
    desk.print("fixer", b"mended\n", end=True)
    desk.print("tester", b"tried\nmor", end=True)


async def test_logs_of_several_agents(line: Mb, desk: Desk) -> None:
    """Which agents there are is told; --all prints each one's lines behind its name, for programs an object for each."""
    with_two_agents(desk)
    asked = await line.run("logs", NAME)
    assert (asked.code, "fixer, tester" in asked.stderr, "--all" in asked.stderr) == (Exit.INVALID, True, True)
    assert (await line.run("logs", NAME, "--all")).stdout == "fixer | mended\ntester | tried\ntester | mor\n"
    followed = await line.run("logs", NAME, "--all", "--follow", "--tail", "1")
    assert sorted(followed.stdout.splitlines()) == ["fixer | mended", "tester | mor"]
    listed = (await line.run("logs", NAME, "--all", "--json")).value()
    assert [(one["agent"], one["next_offset"]) for one in listed] == [("fixer", 7), ("tester", 9)]
    lines = (await line.run("logs", NAME, "--all", "--follow", "--json")).stdout.splitlines()
    assert {json.loads(text)["agent"]: json.loads(text)["text"] for text in lines} == {
        "fixer": "mended\n",
        "tester": "tried\nmor",
    }
    assert (await line.run("logs", NAME, "fixer", "--all")).code == Exit.INVALID


async def test_next_steps_name_the_sandbox(line: Mb, desk: Desk) -> None:
    """Hosts write NAME; whoever reads the error gets a command that works."""
    desk.put(sandbox(phase=Phase.COMPLETED))
    for arguments in (("exec", NAME, "--", "true"), ("cp", f"{NAME}:/a", "/tmp/never")):
        assert f"see mb status {NAME}" in (await line.run(*arguments)).stderr


async def test_names_are_completed(line: Mb, desk: Desk) -> None:
    """Tab offers the sandboxes and their agents; a scheduler that does not answer costs a second and no error."""
    desk.put(sandbox(phase=Phase.RUNNING))
    words = f"mb --config {line.config} logs "
    asked = {"_MB_COMPLETE": "bash_complete", "COMP_CWORD": "4", "COMP_WORDS": words}
    assert (await end_of(await line.start(environment=asked))).stdout == f"plain,{NAME}\n"
    asked |= {"COMP_CWORD": "5", "COMP_WORDS": f"{words}{NAME} "}
    assert (await end_of(await line.start(environment=asked))).stdout == "plain,fixer\n"
    desk.sandboxes.clear()
    assert (await end_of(await line.start(environment=asked))).stdout.strip() == ""
