"""One boot with many agents: each proves one promise of guestd, and hostd's own sessions take their words."""

import asyncio
import json
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fleet.model.sandbox import Agent, AgentPhase, AgentStatus, EnvVar
from mb.artifact import read_artifact
from tests.integration.guestd.parts import ADDRESS, OUTPUT_BYTES_MAX, Host, Site, pack_tree

pytestmark = [pytest.mark.root, pytest.mark.vm]

# Three times what a guest may send ahead of an ack.
MUCH_BYTES = 3_000_000
# Sixteen agents start at once on an emulated CPU: by then a shell has set its traps.
STARTED_S = 20.0

WORKSPACE = {
    "keep.txt": "kept\n",
    "touched.txt": "touched\n",
    "same.txt": "same\n",
    "edit.txt": "before\n",
    "mode.sh": "#!/bin/sh\n",
    "gone.txt": "gone\n",
    "old-name.txt": "renamed\n",
    "link": "-> keep.txt",
    "file-to-folder": "a file\n",
    "drop": None,
    "drop/deep": None,
    "drop/deep/a": "a\n",
    "remake": None,
    "remake/before": "b\n",
    "remake/stays": "s\n",
    "folder-to-file": None,
    "folder-to-file/x": "x\n",
    "folder": None,
    "folder/inner": "inner\n",
}
WORK = r"""
set -e
touch touched.txt
cp same.txt copy && cat copy > same.txt && rm copy
echo after > edit.txt
chmod +x mode.sh
rm gone.txt
mv old-name.txt new-name.txt
ln -sf edit.txt link
rm file-to-folder && mkdir file-to-folder && echo in > file-to-folder/in
rm -r drop
cp -r remake kept && rm -r remake && mkdir remake && cp kept/stays remake/stays && echo n > remake/new && rm -r kept
rm -r folder-to-file && echo f > folder-to-file
mv folder moved
mkfifo pipe
echo accent > "$(printf 'caf\303\251')"
echo bytes > "$(printf 'no-utf8-\377')"
mkdir -m 700 private
"""
CHANGES = [
    ("café", "added", False),
    ("drop", "deleted", False),
    ("drop/deep", "deleted", False),
    ("drop/deep/a", "deleted", False),
    ("edit.txt", "modified", False),
    ("file-to-folder", "modified", False),
    ("file-to-folder/in", "added", False),
    ("folder", "deleted", False),
    ("folder-to-file", "modified", False),
    ("folder-to-file/x", "deleted", False),
    ("folder/inner", "deleted", False),
    ("gone.txt", "deleted", False),
    ("link", "modified", False),
    ("mode.sh", "modified", False),
    ("moved", "added", False),
    ("moved/inner", "added", False),
    ("new-name.txt", "added", False),
    ("no-utf8-\\xff", "added", True),
    ("old-name.txt", "deleted", False),
    ("pipe", "added", True),
    ("private", "added", False),
    ("remake/before", "deleted", False),
    ("remake/new", "added", False),
]

SELF = r"""
id; umask; ulimit -c; readlink /proc/self/fd/0; cat /proc/self/cgroup; grep NoNewPrivs /proc/self/status
cat /proc/self/oom_score_adj
ls /proc/$$/fd | tr '\n' ' '; echo
[ "$(ps -o sid= -p $$ | tr -d ' ')" = $$ ] && echo leads
"""
# Everything that only root may do: each line says what was attempted and whether it was possible.
SPY = r"""
import os, glob, socket
def attempt(name, do):
    try: do(); print(name, "POSSIBLE")
    except OSError as error: print(name, "denied")
guestd = open("/sys/fs/cgroup/bedplate/guestd/cgroup.procs").read().split()
attempt("scratch", lambda: os.listdir("/run/bedplate/scratch"))
attempt("configuration", lambda: open("/run/bedplate/scratch/guestd/configuration"))
attempt("port", lambda: open(glob.glob("/dev/vport*")[0], "rb"))
for disk in glob.glob("/dev/vd?"): attempt("disk", lambda: open(disk, "rb"))
attempt("kill", lambda: os.kill(int(guestd[0]), 9))
attempt("environment", lambda: open(f"/proc/{guestd[0]}/environ").read())
attempt("memory", lambda: open(f"/proc/{guestd[0]}/mem", "rb"))
attempt("cgroup", lambda: open("/sys/fs/cgroup/bedplate/guestd/cgroup.procs", "w").write("0"))
attempt("limit", lambda: open("/sys/fs/cgroup/bedplate/agent-spy/memory.max", "w").write("max"))
attempt("program", lambda: open("/usr/lib/bedplate/guestd.pyz", "wb"))
attempt("users", lambda: open("/etc/passwd", "a"))
attempt("shadow", lambda: open("/etc/shadow"))
attempt("whiteout", lambda: os.mknod("/workspace/whiteout", 0o020000, 0))
attempt("mark", lambda: os.setxattr("/workspace", "trusted.overlay.opaque", b"y"))
attempt("readonly", lambda: open("/data/new", "w"))
attempt("address6", lambda: socket.create_connection(("::1", 1)))
"""
NET = r"""
import fcntl, socket, struct, time
for name in ("eth0", "lo"):
    with socket.socket() as s:
        print(name, socket.inet_ntoa(fcntl.ioctl(s, 0x8915, struct.pack("256s", name.encode()))[20:24]),
              socket.inet_ntoa(fcntl.ioctl(s, 0x891B, struct.pack("256s", name.encode()))[20:24]))
print(socket.gethostname(), socket.gethostbyname(socket.gethostname()), open("/etc/hostname").read().strip())
print(abs(time.time() - NOW) < 3600)
"""


def shell(name: str, script: str, **fields: object) -> Agent:
    return Agent(name, "custom", ("sh", "-c", script), **fields)  # type: ignore[arg-type]


def agents(now_s: float) -> list[Agent]:
    return [
        shell("exit-3", "echo one; echo two >&2; exit 3"),
        Agent("env", "custom", ("env",), env=(EnvVar("OWN", "a b=c"),)),
        shell("self", SELF),
        shell("work", WORK),
        shell("stubborn", "trap '' TERM; while :; do sleep 100; done", timeout_s=STARTED_S, grace_period_s=0.5),
        shell("polite", "trap 'echo bye; exit 7' TERM; echo here; sleep 100 & wait", timeout_s=STARTED_S),
        Agent("hungry", "custom", ("python3", "-c", "bytearray(200 << 20)"), memory_mib=32),
        Agent("nowhere", "custom", ("true",), workdir="/not/there"),
        Agent("nothing", "custom", ("no-such-program",)),
        Agent("no-program", "custom", ("/workspace/keep.txt",)),
        shell("much", f"head -c {MUCH_BYTES} /dev/zero | tr '\\0' x"),
        shell("flood", f"head -c {OUTPUT_BYTES_MAX + 1} /dev/zero; echo never"),
        shell("leaver", "(trap '' TERM HUP; sleep 1000; echo late) & echo left"),
        shell("forker", "for i in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; echo forked", pids_max=4),
        Agent("spy", "custom", ("python3", "-c", SPY)),
        Agent("net", "custom", ("python3", "-c", NET.replace("NOW", str(now_s)))),
    ]


@dataclass
class Story:
    """What the host held when the guest had powered off."""

    host: Host
    qemu_code: int
    hello_s: float
    first_output_s: float

    def agent(self, name: str) -> AgentStatus:
        return next(agent for agent in self.host.progress.agents if agent.name == name)

    def lines(self, name: str) -> list[str]:
        return self.host.output(name).decode().splitlines()


async def _tell(site: Site, now_s: float) -> Story:
    sources = [(pack_tree(WORKSPACE), "/workspace", False), (pack_tree({"d.txt": "data\n"}), "/data", True)]
    vm, order = await site.start(sources, agents(now_s))
    host = Host(site.folder / "state", vm, order)
    try:
        await host.finish()
        code = await vm.wait()
    finally:
        await host.crash()
    first = [host.links.first_at_s(type_) - vm.started_at_s for type_ in ("hello", "output")]
    return Story(host, code, first[0], first[1])


@pytest.fixture(scope="module")
def story(site: Site, record_testsuite_property: Callable[[str, object], None]) -> Story:
    """The boot, told once."""
    told = asyncio.run(_tell(site, time.time()))
    record_testsuite_property("guestd_hello_s", round(told.hello_s, 1))
    record_testsuite_property("guestd_first_output_s", round(told.first_output_s, 1))
    return told


def test_the_sandbox_runs_to_its_end(story: Story) -> None:
    """Artifact stored, nothing failed as a whole, and the guest has powered itself off."""
    assert story.host.progress.failure is None
    assert story.host.progress.artifact is not None
    assert story.qemu_code == 0


def test_streams_are_merged_and_exit_codes_are_real(story: Story) -> None:
    """Both streams come in order, and the agent's own exit code is what the host is told."""
    status = story.agent("exit-3")
    assert (story.host.output("exit-3"), status.phase, status.exit_code) == (b"one\ntwo\n", AgentPhase.FAILED, 3)


def test_an_environment_is_built_from_nothing(story: Story) -> None:
    """An agent finds its own variables and the base, and nothing of guestd's, of systemd's or of the host's."""
    assert sorted(story.lines("env")) == [
        "HOME=/home/agent",
        "LANG=C.UTF-8",
        "LOGNAME=agent",
        "OWN=a b=c",
        "PATH=/usr/local/bin:/usr/bin:/bin",
        "SHELL=/bin/bash",
        "TERM=dumb",
        "USER=agent",
    ]


def test_an_agent_has_no_privilege_and_nothing_of_guestd(story: Story) -> None:
    """Its ids, its only groups, umask, core limit, stdin, cgroup, OOM score, descriptors and session are its own."""
    assert story.lines("self") == [
        "uid=1001(agent) gid=1001(agent) groups=1001(agent)",
        "0022",
        "0",
        "/dev/null",
        "0::/bedplate/agent-self",
        "NoNewPrivs:\t1",
        "0",
        "0 1 2 ",
        "leads",
    ]


def test_an_agent_can_touch_nothing_of_roots(story: Story) -> None:
    """State, port, disks, limits, root's processes and files are out of an agent's reach, and so is a readonly source."""
    lines = story.lines("spy")
    assert len(lines) > 15
    assert [line for line in lines if not line.endswith(" denied")] == []


def test_a_timeout_ends_an_agent_for_good(story: Story) -> None:
    """TERM first; who ignores it is killed after the grace period, who heeds it may still speak and choose its exit code."""
    stubborn, polite = story.agent("stubborn"), story.agent("polite")
    assert (stubborn.phase, stubborn.signal, stubborn.exit_code) == (AgentPhase.TIMED_OUT, 9, None)
    assert (polite.phase, polite.signal, polite.exit_code) == (AgentPhase.TIMED_OUT, None, 7)
    assert story.lines("polite") == ["here", "bye"]


def test_memory_is_limited_and_said_so(story: Story) -> None:
    """An agent past its memory is killed, and the host is told why."""
    status = story.agent("hungry")
    assert (status.phase, status.signal) == (AgentPhase.FAILED, 9)
    assert status.reason is not None
    assert "more than its 32 MiB of memory" in status.reason.message


def test_processes_are_limited(story: Story) -> None:
    """The fork past pids_max fails."""
    assert story.agent("forker").phase is AgentPhase.FAILED
    assert "forked" not in story.lines("forker")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("nowhere", 126, "working directory /not/there cannot be entered: No such file"),
        ("nothing", 127, "program no-such-program cannot be executed: No such file"),
        ("no-program", 126, "program /workspace/keep.txt cannot be executed: Permission denied"),
    ],
)
def test_what_cannot_be_executed_is_explained(story: Story, name: str, code: int, words: str) -> None:
    """A program or folder that is not there fails its agent with the shell's exit code and a sentence."""
    status = story.agent(name)
    assert (status.phase, status.exit_code) == (AgentPhase.FAILED, code)
    assert status.reason is not None
    assert words in status.reason.message


def test_much_output_is_complete(story: Story) -> None:
    """Output far past what may be under way at once arrives whole."""
    assert story.host.output("much") == b"x" * MUCH_BYTES
    assert not story.agent("much").output_truncated


def test_output_is_cut_at_its_limit(story: Story) -> None:
    """Exactly the limit is kept, the host is told that more came, and the agent is not held up."""
    status = story.agent("flood")
    assert story.host.output("flood") == bytes(OUTPUT_BYTES_MAX)
    assert status.output_truncated
    assert status.phase is AgentPhase.COMPLETED


def test_nothing_outlives_an_agent(story: Story) -> None:
    """What the main process leaves behind is killed, whatever it ignores, and says nothing more."""
    assert (story.agent("leaver").phase, story.lines("leaver")) == (AgentPhase.COMPLETED, ["left"])


def test_the_machine_is_what_the_host_says(story: Story) -> None:
    """Address, loopback, name and clock are set before the first agent runs."""
    assert story.lines("net") == [
        f"eth0 {ADDRESS} 255.255.255.0",
        "lo 127.0.0.1 255.0.0.0",
        "box 127.0.1.1 box",
        "True",
    ]


def test_the_artifact_is_the_exact_change(story: Story) -> None:
    """Each changed path once, in order, with its kind; what was only touched, or written again as it was, is not there."""
    assert story.agent("work").phase is AgentPhase.COMPLETED
    with tarfile.open(story.host.orders.artifact_path(story.host.order.sandbox_id)) as archive:
        listing = archive.extractfile("changes.json")
        assert listing is not None
        found = json.load(listing)
        members = {member.name: member for member in archive.getmembers()[1:]}
        after = archive.extractfile("0/edit.txt")
        assert after is not None
        assert after.read() == b"after\n"
    first, second = found["sources"]
    changes = [(change["path"], change["kind"], change.get("skipped", False)) for change in first["changes"]]
    assert changes == CHANGES
    assert (second["guest_path"], second["changes"]) == ("/data", [])
    assert [source["digest"] for source in found["sources"]] == [
        source.digest for source in story.host.order.spec.sources
    ]
    assert list(members) == [f"0/{path}" for path, kind, skipped in CHANGES if kind != "deleted" and not skipped]
    assert members["0/link"].linkname == "edit.txt"
    assert (members["0/mode.sh"].mode, members["0/private"].mode) == (0o755, 0o700)
    assert members["0/private"].isdir()
    assert story.host.progress.artifact.changes == len(CHANGES)


def test_the_artifact_is_one_that_mb_trusts(story: Story) -> None:
    """The receivers' own reader, which refuses all that is not as documented, takes it."""
    path = story.host.orders.artifact_path(story.host.order.sandbox_id)
    with path.open("rb") as stream:
        found = read_artifact(stream, path.stat().st_size, ["/workspace", "/data"], [{}, {}])
    assert [len(changes) for changes in found] == [len(CHANGES), 0]
