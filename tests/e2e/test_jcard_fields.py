"""Every field of a jcard that a guest can feel, felt there: docs/jcard.md names these tests as its proofs."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from provisioning.embedded.fleet import EmbeddedFleet
from tests.e2e.operate import Tenant, wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

HEAD = """
name = "{name}"
[resources]
cpus = 1
memory = "512MiB"
disk = "256MiB"
"""
SHARED = '[[shared]]\nhost = "."\nguest = "/workspace"\n'


def write(tenant: Tenant, name: str, tables: str, files: dict[str, str] | None = None, head: str = HEAD) -> str:
    """A folder with a jcard of these tables, and files beside it."""
    folder = tenant.folder / name
    for path, text in {"jcard.toml": head.format(name=name) + tables, **(files or {})}.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return str(folder)


def agent(name: str, command: list[str] | str, *lines: str) -> str:
    """A custom agent's table."""
    head = f'[[agents]]\nname = "{name}"\nharness = "custom"\nmemory = "128MiB"\ncommand = {json.dumps(command)}'
    return "\n".join([head, *lines, ""])


def agents_of(tenant: Tenant, name: str) -> dict[str, Any]:
    """What became of each agent."""
    return {one["name"]: one for one in tenant.status(name)["status"]["agents"]}


def output(tenant: Tenant, name: str, agent_name: str) -> list[str]:
    """The lines that one agent printed."""
    return tenant.run("logs", name, agent_name).out.splitlines()


def test_restart_on_failure(tenant: Tenant) -> None:
    """A program that exits with 1 is started again until it exits with 0; one that exits with 0 is not."""
    script = "echo start >>/tmp/starts; echo run; test $(wc -l </tmp/starts) -ge 3"
    stubborn = agent("stubborn", script, 'restart = "on-failure"', "max_restarts = 9")
    content = agent("content", "echo run", 'restart = "on-failure"')
    done = tenant.run("up", write(tenant, "again", stubborn + content))
    assert done.code == 0, done
    agents = agents_of(tenant, "again")
    assert [(agents[name]["phase"], agents[name]["exit_code"]) for name in agents] == [("completed", 0)] * 2
    assert (agents["stubborn"]["restarts"], agents["content"]["restarts"]) == (2, 0)
    assert output(tenant, "again", "stubborn") == ["run"] * 3
    assert output(tenant, "again", "content") == ["run"]
    tenant.destroy("again")


def test_restart_always_up_to_max(tenant: Tenant) -> None:
    """`always` means after a 0, too, and `max_restarts` is the end of it."""
    done = tenant.run(
        "up", write(tenant, "ever", agent("worker", "echo run", 'restart = "always"', "max_restarts = 2"))
    )
    assert done.code == 0, done
    assert output(tenant, "ever", "worker") == ["run"] * 3
    assert agents_of(tenant, "ever")["worker"]["restarts"] == 2
    tenant.destroy("ever")


def test_timeout_kills_at_grace_period(tenant: Tenant) -> None:
    """At its timeout an agent gets TERM; one that ignores it is killed at the end of its grace period, children and all."""
    script = """
import os, signal, time
os.fork()
signal.signal(signal.SIGTERM, lambda *_: print("TERM is ignored", flush=True))
end = time.monotonic() + 120
while time.monotonic() < end:
    time.sleep(0.1)
print("survived", flush=True)
"""
    limits = ('timeout = "4s"', 'grace_period = "2s"')
    deaf = agent("deaf", ["python3", "/workspace/deaf.py"], *limits)
    done = tenant.run("up", write(tenant, "late", SHARED + deaf, {"deaf.py": script}))
    assert done.code == 3, done
    assert agents_of(tenant, "late")["deaf"]["phase"] == "timed-out"
    assert set(output(tenant, "late", "deaf")) == {"TERM is ignored"}
    tenant.destroy("late")


def test_memory_limit_kills(tenant: Tenant) -> None:
    """An agent past its own limit is killed; its neighbour in the same sandbox does not notice."""
    hungry = agent("hungry", ["python3", "-c", "bytearray(300 << 20)"])
    modest = agent("modest", ["python3", "-c", "bytearray(30 << 20); print('fed')"])
    assert tenant.run("up", write(tenant, "hunger", hungry + modest)).code == 3
    agents = agents_of(tenant, "hunger")
    assert (agents["hungry"]["phase"], agents["hungry"]["signal"]) == ("failed", signal.SIGKILL)
    assert agents["modest"]["phase"] == "completed"
    assert output(tenant, "hunger", "modest") == ["fed"]
    tenant.destroy("hunger")


def test_pid_limit_holds(tenant: Tenant) -> None:
    """A bomb of processes ends at the limit of its agent."""
    script = """
import os, signal, time
born = []
try:
    while len(born) < 200:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        born.append(child)
except BlockingIOError:
    pass
print(len(born), flush=True)
for child in born:
    os.kill(child, signal.SIGKILL)
"""
    bomb = agent("bomb", ["python3", "/workspace/bomb.py"], "pid_limit = 12")
    tenant.run("up", write(tenant, "bomb", SHARED + bomb, {"bomb.py": script}))
    (born,) = output(tenant, "bomb", "bomb")
    assert 1 <= int(born) < 12
    tenant.destroy("bomb")


def test_session_is_a_tmux_session(tenant: Tenant) -> None:
    """An agent with a session has a terminal, which tmux shows under that name; one without has none."""
    seen = agent("seen", "test -t 1 && echo on a terminal; exec sleep 600", 'session = "watch"')
    plain = agent("plain", "test -t 1 || echo no terminal")
    with tenant.start("up", write(tenant, "seen", seen + plain)) as up:
        up.until_printed("on a terminal")
        tmux = ("exec", "seen", "--", "tmux", "-S", "/run/bedplate/tmux")
        # The agent does not wait for tmux, which takes a moment longer to be there.
        names = (*tmux, "list-sessions", "-F", "#{session_name}")
        assert wait_until(lambda: tenant.run(*names), lambda done: done.code == 0).out.split() == ["watch"]
        wait_until(
            lambda: tenant.run(*tmux, "capture-pane", "-p", "-t", "=watch:").out, lambda pane: "on a term" in pane
        )
        assert output(tenant, "seen", "plain") == ["no terminal"]
        assert tenant.run("stop", "seen").code == 0
        up.wait()
    tenant.destroy("seen")


def test_secrets_are_files_on_tmpfs(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """A value is in the guest's memory, for the agent alone to read; no disk, log, command line or environment has it."""
    value = "s3cret-that-is-nowhere-else-7f1c"
    script = """
import hashlib, os, stat, subprocess
path = os.environ["TOKEN_FILE"]
about = os.stat(path)
print(path, oct(stat.S_IMODE(about.st_mode)), about.st_uid == os.getuid())
print(subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True).stdout.strip())
print("TOKEN" in os.environ, hashlib.sha256(open(path, "rb").read()).hexdigest(), flush=True)
os.execvp("sleep", ["sleep", "600"])
"""
    keeper = agent("keeper", ["python3", "/workspace/look.py"])
    tables = f'[secrets]\nTOKEN = "{value}"\n[[shared]]\nhost = "src"\nguest = "/workspace"\n'
    folder = write(tenant, "quiet", tables + keeper, {"src/look.py": script})
    with tenant.start("up", folder) as up:
        up.until_printed("False")
        subprocess.run(["sync"], check=True)
        assert found_on_host(value, fleet.folder) == []
        assert value not in tenant.run("status", "quiet", "--json").out
        assert value not in tenant.run("events", "quiet", "--json").out
        inside = tenant.run(
            "exec", "quiet", "--user", "root", "--", "grep", "-rlsF", value, "/home", "/tmp", "/var", "/etc"
        )
        assert (inside.code, inside.out) == (1, ""), inside
        assert tenant.run("stop", "quiet").code == 0
        up.wait()
    digest = subprocess.run(["sha256sum"], input=value, capture_output=True, text=True, check=True).stdout.split()[0]
    assert output(tenant, "quiet", "keeper") == ["/run/secrets/TOKEN 0o400 True", "tmpfs", f"False {digest}"]
    assert found_on_host(value, fleet.folder) == []
    tenant.destroy("quiet")


def found_on_host(text: str, folder: Path) -> list[str]:
    """Where a fleet's files, disks and logs, or any process's arguments and environment, hold `text`."""
    grep = subprocess.run(["grep", "-rlsaF", text, str(folder)], capture_output=True, text=True, check=False)
    found = grep.stdout.splitlines()
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                content = (process / name).read_bytes()
            except OSError:
                continue  # It has ended.
            if text.encode() in content:
                found.append(str(process / name))
    return found


def test_three_replicas(tenant: Tenant) -> None:
    """Three copies run at the same time: each waits until it has seen the two others."""
    script = "touch /workspace/$$; until [ $(ls /workspace | grep -c '^[0-9]*$') = 3 ]; do sleep 0.2; done; echo met"
    done = tenant.run("up", write(tenant, "three", SHARED + agent("mill", script, "replicas = 3", "gang = true")))
    assert done.code == 0, done
    assert {name: one["phase"] for name, one in agents_of(tenant, "three").items()} == {
        f"mill-{index}": "completed" for index in range(3)
    }
    assert [output(tenant, "three", f"mill-{index}") for index in range(3)] == [["met"]] * 3
    tenant.destroy("three")


def test_env_and_workdir(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent starts where it was told, with its variables and none of the caller's; without a source it starts at home."""
    monkeypatch.setenv("FLAVOUR", "mint")
    monkeypatch.setenv("PRIVATE", "of the caller")
    look = 'pwd; echo "$TASTE"; env | grep -c "^PRIVATE=\\|^FLAVOUR="; touch here && echo writable'
    deep = agent("deep", look, 'workdir = "/workspace/deep"', 'env = { TASTE = "fresh ${FLAVOUR}" }')
    tenant.run("up", write(tenant, "deep", SHARED + deep, {"deep/file": "x"}))
    assert output(tenant, "deep", "deep") == ["/workspace/deep", "fresh mint", "0", "writable"]
    tenant.run("up", write(tenant, "home", agent("home", look)))
    assert output(tenant, "home", "home") == ["/home/agent", "", "0", "writable"]
    tenant.destroy("deep", "home")


def test_readonly_source(tenant: Tenant) -> None:
    """`readonly` is the absence of a layer for changes: nothing can be written there, and a source beside it can."""
    shared = '[[shared]]\nhost = "one"\nguest = "/fixed"\nreadonly = true\n'
    shared += '[[shared]]\nhost = "two"\nguest = "/loose"\n'
    script = "cat /fixed/a /loose/b; touch /fixed/new || echo refused; touch /loose/new && echo written"
    folder = write(tenant, "layers", shared + agent("worker", script), {"one/a": "one\n", "two/b": "two\n"})
    assert tenant.run("up", folder).code == 0
    found = output(tenant, "layers", "worker")
    assert (found[:2], found[-2:]) == (["one", "two"], ["refused", "written"])
    assert "Read-only file system" in found[2]
    diff = tenant.run("diff", "layers", "--stat").out
    fixed, loose = diff.split("# /loose")
    assert ("new" in fixed, "new" in loose, "1 path" in loose) == (False, True, True), diff
    tenant.destroy("layers")


def test_harness_gets_its_prompt(tenant: Tenant) -> None:
    """A harness's program gets prompt, flags, environment and key; where no image has it, the agent says so."""
    show = '#!/bin/sh\nprintf "%s|" "$0" "$@"; echo\nprintenv DISABLE_AUTOUPDATER ANTHROPIC_API_KEY | sha256sum\n'
    path = 'env = { PATH = "/workspace/bin:/usr/bin:/bin" }\nmemory = "128MiB"\n'
    tables = f'[secrets]\nANTHROPIC_API_KEY = "sk-e2e"\n{SHARED}'
    tables += f'[[agents]]\nname = "claude"\nprompt = "--mend $it"\n{path}'
    tables += f'[[agents]]\nname = "open"\nharness = "opencode"\nprompt_file = "ask.md"\n{path}'
    tables += f'[[agents]]\nname = "codex"\nharness = "codex"\nprompt = "x"\n{path}'
    files = {"bin/claude": show, "bin/opencode": show, "ask.md": "mend that"}
    assert tenant.run("up", write(tenant, "harness", tables, files)).code == 3
    told = output(tenant, "harness", "claude")
    assert told[0] == "/workspace/bin/claude|--print|--dangerously-skip-permissions|--|--mend $it|"
    digest = (
        subprocess.run(["sha256sum"], input=b"1\nsk-e2e\n", capture_output=True, check=True).stdout.decode().split()[0]
    )
    assert told[1].split()[0] == digest
    assert output(tenant, "harness", "open")[0] == "/workspace/bin/opencode|run|--auto|--|mend that|"
    missing = agents_of(tenant, "harness")["codex"]
    assert (missing["phase"], missing["exit_code"], "codex" in missing["reason"]["message"]) == ("failed", 127, True)
    tenant.destroy("harness")


def test_digest_pin(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """A pinned image is that image or none: with another digest no host takes the sandbox."""
    operator = Tenant(fleet, tenant.folder, fleet.operator_config)
    hosts = wait_until(lambda: operator.run("host", "ls", "--json").json(), bool)
    digest = next(image["digest"] for image in hosts[0]["record"]["images"] if image["name"] == "base:latest")
    head = 'mixtape = "base:latest"\nmixtape_digest = "{digest}"\n' + HEAD
    right = write(tenant, "right", agent("worker", "echo run"), head=head.replace("{digest}", digest))
    wrong = write(tenant, "wrong", agent("worker", "echo run"), head=head.replace("{digest}", "sha256:" + "0" * 64))
    assert tenant.run("up", right).code == 0
    assert tenant.status("right")["image_digest"] == digest
    assert tenant.run("up", wrong, "--detach").code == 0
    status = tenant.until("wrong", lambda found: found["refusal"] is not None)
    assert (status["phase"], status["refusal"]["reasons"][0]["code"]) == ("pending", "image_unknown")
    tenant.destroy("right", "wrong")


def test_resources_are_as_asked(tenant: Tenant) -> None:
    """The guest counts the vCPUs, finds its memory and can fill its disk up to what was asked for."""
    script = """
import os
memory = int(open("/proc/meminfo").readline().split()[1]) // 1024
disk = os.statvfs("/home/agent")
print(os.cpu_count(), memory, disk.f_blocks * disk.f_frsize >> 20)
"""
    head = HEAD.replace("cpus = 1", "cpus = 2").replace("512MiB", "700MiB").replace("256MiB", "300MiB")
    folder = write(tenant, "sized", SHARED + agent("worker", ["python3", "size.py"]), {"size.py": script}, head)
    assert tenant.run("up", folder).code == 0
    cpus, memory_mib, disk_mib = map(int, output(tenant, "sized", "worker")[0].split())
    assert cpus == 2
    # The kernel and the file system keep some for themselves.
    assert 550 <= memory_mib <= 700
    assert 230 <= disk_mib <= 300
    tenant.destroy("sized")


def test_network_modes(tenant: Tenant) -> None:
    """`none` is no device, `closed` one from which nothing passes; what would be open is refused before anything starts."""
    script = (
        "ls /sys/class/net; timeout 5 python3 -c \"import socket; socket.create_connection(('10.77.0.1', 22), 3)\" "
    )
    look = agent("worker", script + "2>/dev/null && echo out || echo shut")
    for mode, devices in (("none", 1), ("closed", 2)):
        folder = write(tenant, mode, f'[network]\nmode = "{mode}"\n{look}')
        assert tenant.run("up", folder).code == 0
        *found, reached = output(tenant, mode, "worker")
        assert ("lo" in found, len(found), reached) == (True, devices, "shut")
        if mode == "closed":
            # The guest's try is on record: its host saw the frames, and dropped them.
            with tenant.start("network", "log", mode, "--follow", "--denied", "--json") as record:
                record.until_printed('"reason": "closed"')
        else:
            assert tenant.run("network", "log", mode, "--json").json() == []
        tenant.destroy(mode)
    for mode in ("nat", "allow", "bridged"):
        folder = write(tenant, mode, f'[network]\nmode = "{mode}"\n{look}')
        done = tenant.run("up", folder)
        assert (done.code, "network.mode" in done.err) == (2, True), done
