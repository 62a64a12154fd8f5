"""Programs run by hand in a real guest, beside agents that do their worst: limits hold, and guestd stays prompt."""

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fleet.model.sandbox import Agent
from hostd.drivers.ports import LinkMessage
from tests.integration.guestd.parts import A, Host, Site, pack_tree

pytestmark = [pytest.mark.root, pytest.mark.vm]

ROUNDS = 20
# Each child stays; the fork past the limit fails, and with it the bomb.
BOMB = "import os, time\nwhile True:\n    if os.fork() == 0: time.sleep(10000)"
TMUX = "tmux -S /run/bedplate/tmux"
TYPE = f"until {TMUX} has-session -t =watch; do sleep 0.2; done; {TMUX} send-keys -t =watch: hello Enter"


@dataclass
class Told:
    """What programs said and how they ended, by id."""

    host: Host
    true_ms: list[float]

    def ended(self, number: int) -> dict[str, object]:
        (found,) = [m for m in self.host.links.of_type("exec-ended") if m.fields["exec"] == number]
        return {key: found.fields[key] for key in ("exit_code", "signal", "message")}

    def lines(self, number: int) -> list[str]:
        payloads = [m.payload for m in self.host.links.of_type("exec-output") if m.fields["exec"] == number]
        return b"".join(payloads).decode().splitlines()


async def _run(host: Host, number: int, *command: str, **fields: object) -> float:
    """How many milliseconds it took from the frame to its end."""
    started_s = time.monotonic()
    about = {"exec": number, "command": list(command), "workdir": "", "env": [], "user": "agent", "terminal": None}
    await host.links.send(A, LinkMessage("exec", {**about, **fields}))
    await host.until(lambda: any(m.fields["exec"] == number for m in host.links.of_type("exec-ended")))
    return (time.monotonic() - started_s) * 1000


async def _tell(site: Site) -> Told:
    keys = Agent("keys", "custom", ("sh", "-c", "read x; echo got $x; exec sleep 10000"), session="watch")
    agents = [Agent("sleeper", "custom", ("sleep", "10000")), keys]
    vm, order = await site.start([(pack_tree({"a.txt": "a\n"}), "/workspace", False)], agents)
    host = Host(site.folder / "state", vm, order)
    try:
        await host.until(lambda: bool(host.links.of_type("heartbeat")))
        await _run(host, 1, "sh", "-c", "id -un; pwd; cat /proc/self/cgroup", workdir="/workspace")
        await _run(host, 2, "python3", "-c", BOMB)
        await _run(host, 3, "sh", "-c", "id -un; pwd; cat /sys/fs/cgroup/bedplate/exec-*/pids.max", user="root")
        await _run(host, 4, "python3", "-c", "a = []\nwhile True: a.append(bytearray(1 << 20))")
        await _run(
            host,
            5,
            "sh",
            "-c",
            "stty size; tty; echo hi >/dev/tty",
            terminal={"columns": 100, "rows": 30, "term": "vt100"},
        )
        await _run(host, 6, "sh", "-c", TYPE)
        await host.until(lambda: b"got hello\n" in host.output("keys"))
        await _run(host, 7, "sh", "-c", f"until {TMUX} capture-pane -p -t =watch: | grep got; do sleep 0.2; done")
        true_ms = [await _run(host, 100 + number, "true") for number in range(ROUNDS)]
        await host.links.send(A, LinkMessage("stop", {"grace_period_s": 0}))
        await host.finish()
        await vm.wait()
    finally:
        await host.crash()
    return Told(host, true_ms)


@pytest.fixture(scope="module")
def told(site: Site, record_testsuite_property: Callable[[str, object], None]) -> Told:
    """The boot, told once."""
    found = asyncio.run(_tell(site))
    record_testsuite_property("exec_true_ms", round(statistics.median(found.true_ms), 1))
    return found


def test_a_program_runs_as_who_it_should(told: Told) -> None:
    """The user agent where asked for, in its own cgroup; root in its home otherwise."""
    user, folder, cgroup = told.lines(1)
    assert (user, folder) == ("agent", "/workspace")
    assert cgroup.startswith("0::/bedplate/exec-")
    assert told.lines(3)[:2] == ["root", "/root"]
    assert set(told.lines(3)[2:]) == {"512"}
    assert told.ended(1) == {"exit_code": 0, "signal": None, "message": ""}


def test_a_terminal_is_the_programs_own(told: Told) -> None:
    """It has its size, belongs to its user and controls the program's session."""
    size, device, greeting = told.lines(5)
    assert (size, device.startswith("/dev/pts/"), greeting) == ("30 100", True, "hi")


def test_bombs_of_processes_and_memory_harm_only_themselves(told: Told) -> None:
    """A fork bomb ends within its limit; a hog of memory is what the kernel kills, not the agent and not guestd."""
    assert told.ended(2)["exit_code"] == 1
    assert told.ended(4)["signal"] == 9
    sleeper, _ = told.host.progress.agents
    assert sleeper.signal in (9, 15)
    assert len({m.fields["boot_id"] for m in told.host.links.of_type("hello")}) == 1
    assert told.host.progress.artifact is not None


def test_a_session_is_shown_by_tmux_and_takes_keys(told: Told) -> None:
    """What is typed into the tmux session reaches the agent, its answer is on the screen, and its log has the bytes."""
    assert told.lines(7) == ["got hello"]
    assert told.host.output("keys").splitlines()[-1] == b"got hello"
    assert b"\r" not in told.host.output("keys")


def test_every_program_ends_as_itself(told: Told) -> None:
    """Twenty in a row, each with its own end."""
    assert [told.ended(100 + number)["exit_code"] for number in range(ROUNDS)] == [0] * ROUNDS
