"""Sandboxes as their users meet them: real VMs, real agents, `mb` in front of everything."""

import re
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.operate import Tenant

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]


def test_three_sandboxes_at_once(tenant: Tenant) -> None:
    """Three VMs on one host at the same time: each agent works in a source of its own, and each result is its own."""
    names = ["one", "two", "three"]
    for name in names:
        tenant.write_project(
            name, ["sh", "-c", f"cat input; echo {name} changed >output"], {"input": f"input of {name}\n"}
        )
    with ExitStack() as stack:
        running = [stack.enter_context(tenant.start("up", str(tenant.folder / name))) for name in names]
        done = [one.wait() for one in running]
    assert [one.code for one in done] == [0, 0, 0], done
    assert [one.out for one in done] == [f"input of {name}\n" for name in names]
    listed = {one["spec"]["name"]: one for one in tenant.run("ls", "--json").json()}
    assert {listed[name]["phase"] for name in names} == {"completed"}
    assert len({listed[name]["status"]["address"] for name in names}) == 3
    for name in names:
        assert f"+{name} changed" in tenant.run("diff", name).out
    tenant.destroy(*names)


def test_a_failing_agent_is_told_with_its_exit_code(tenant: Tenant) -> None:
    """An agent that exits with 7 makes its sandbox failed: phase, reason and code are told to people and machines alike."""
    folder = tenant.write_project("sour", ["sh", "-c", "echo before; exit 7"])
    done = tenant.run("up", str(folder))
    assert (done.code, done.out) == (3, "before\n")
    status = tenant.status("sour")
    assert (status["phase"], status["status"]["reason"]["code"]) == ("failed", "agent_failed")
    (agent,) = status["status"]["agents"]
    assert (agent["phase"], agent["exit_code"], agent["output_bytes"]) == ("failed", 7, 7)
    assert "exited with code 7" in tenant.run("status", "sour").out
    tenant.destroy("sour")


def test_an_agent_is_alone_unprivileged_and_its_network_closed(tenant: Tenant) -> None:
    """Inside: the user `agent`, an environment built from nothing, no way out; the host's bridge does not answer either."""
    script = """
import os, socket
print("uid", os.getuid(), sorted(os.environ))
for target in ("10.77.0.1", "10.77.0.3", "192.0.2.1"):
    try:
        socket.create_connection((target, 7611), timeout=3)
        print(target, "open")
    except OSError as error:
        print(target, "closed")
"""
    folder = tenant.write_project(
        "alone", ["python3", "look.py"], {"look.py": script}, agent='env = { GREETING = "hi" }'
    )
    done = tenant.run("up", str(folder), "--rm")
    assert done.code == 0, done
    first, *rest = done.out.splitlines()
    assert first.startswith("uid 1001 ")
    assert "'GREETING'" in first
    assert not re.search("BEDPLATE|CONFIG|TOKEN|SUDO", first)
    assert rest == ["10.77.0.1 closed", "10.77.0.3 closed", "192.0.2.1 closed"]


def test_a_sandbox_without_network_has_no_device(tenant: Tenant) -> None:
    """Mode `none` is the absence of a device, not a rule about one."""
    folder = tenant.write_project("none", ["sh", "-c", "ls /sys/class/net"], mode="none")
    done = tenant.run("up", str(folder), "--rm")
    assert (done.code, done.out.split()) == (0, ["lo"])


def test_a_timeout_ends_the_agent(tenant: Tenant) -> None:
    """A timeout is no ornament: the whole group of processes is ended and the agent is told as timed out."""
    folder = tenant.write_project(
        "slow", ["sh", "-c", "echo begun; sleep 600 & sleep 600"], agent='timeout = "2s"\ngrace_period = "1s"'
    )
    done = tenant.run("up", str(folder))
    assert (done.code, done.out) == (3, "begun\n")
    (agent,) = tenant.status("slow")["status"]["agents"]
    assert agent["phase"] == "timed-out"
    tenant.destroy("slow")


def test_a_stop_keeps_output_and_changes(tenant: Tenant) -> None:
    """A stopped sandbox has ended in order: what it had printed and changed is there, its VM is not."""
    folder = tenant.write_project("long", ["sh", "-c", "echo begun; echo half >half; exec sleep 600"])
    with tenant.start("up", str(folder)) as up:
        up.until_printed("begun")
        assert tenant.run("stop", "long").code == 0
        assert up.wait().code == 3
    status = tenant.until("long", lambda found: found["status"]["released"])
    assert (status["phase"], status["status"]["artifact"]["changes"]) == ("stopped", 1)
    assert tenant.run("logs", "long").out == "begun\n"
    assert "+half" in tenant.run("diff", "long").out
    tenant.destroy("long")


def test_a_full_host_is_waited_for(tenant: Tenant) -> None:
    """No room: the sandbox is pending, `mb status` counts why, and it starts by itself when there is room."""
    large = tenant.write_project("large", ["sleep", "600"], memory="5GiB")
    small = tenant.write_project("small", ["echo", "at last"], memory="1GiB")
    assert tenant.run("up", str(large), "--detach").code == 0
    tenant.until("large", lambda found: found["phase"] == "running")
    with tenant.start("up", str(small)) as up:
        status = tenant.until("small", lambda found: found["refusal"] is not None)
        assert status["phase"] == "pending"
        (reason,) = status["refusal"]["reasons"]
        assert (reason["code"], reason["hosts"], status["refusal"]["hosts_considered"]) == ("memory", 1, 1)
        assert "memory" in tenant.run("status", "small").out
        tenant.destroy("large")
        done = up.wait()
    assert (done.code, done.out) == (0, "at last\n")
    tenant.destroy("small")


def test_another_tenant_sees_nothing(tenant: Tenant, stranger: Tenant) -> None:
    """A certificate of the same authority opens neither the listing nor the sandbox, nor its output, nor its end."""
    folder = tenant.write_project("mine", ["echo", "secret"])
    assert tenant.run("up", str(folder)).code == 0
    identity = tenant.status("mine")["sandbox_id"]
    assert stranger.run("ls", "--json").json() == []
    for arguments in (("status", identity), ("logs", identity), ("get", identity), ("destroy", identity)):
        done = stranger.run(*arguments)
        assert done.code == 1, (arguments, done)
        assert "secret" not in done.out + done.err
    assert stranger.run("host", "ls").code == 1
    tenant.destroy("mine")


def test_the_machine_is_limited_and_unprivileged(tenant: Tenant) -> None:
    """QEMU runs as its own user without a capability, under seccomp, with memory and CPU limited by the host's cgroups."""
    folder = tenant.write_project("bound", ["sh", "-c", "echo begun; exec sleep 600"])
    with tenant.start("up", str(folder)) as up:
        up.until_printed("begun")
        domain = f"bp-{tenant.status('bound')['sandbox_id']}"
        listing = subprocess.run(["pgrep", "-f", f"guest={domain},"], capture_output=True, text=True, check=True)
        (pid,) = listing.stdout.split()
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert set(status["Uid"].split()) == {"64123"}
        assert (status["CapEff"], status["CapPrm"], status["Seccomp"]) == ("0" * 16, "0" * 16, "2")
        tuned = subprocess.run(["virsh", "memtune", domain], capture_output=True, text=True, check=True).stdout
        # 512 MiB for the guest, 456 for the VMM (fleet.model.host.overhead_mib).
        assert re.search(r"hard_limit\s*: (\d+)", tuned)[1] == str((512 + 456) * 1024)  # type: ignore[index]
        scheduled = subprocess.run(["virsh", "schedinfo", domain], capture_output=True, text=True, check=True).stdout
        assert re.search(r"global_quota\s*: (\d+)", scheduled)[1] == "100000"  # type: ignore[index]
        tenant.destroy("bound")
        up.wait()


def test_a_guests_kernel_is_hardened_ahead_of_its_agents(tenant: Tenant) -> None:
    """Each kernel parameter of the recipe holds when the first agent runs, and what agents rely on is there."""
    script = """
while read -r path value; do
    found=$(cat "/proc/sys/$path" 2>/dev/null) || { [ -e "/proc/sys/$path" ] && continue; }
    [ "$found" = "$value" ] || echo "$path is $found, not $value"
done </usr/lib/bedplate/sysctl
echo "core $(ulimit -Hc)"
tar --version >/dev/null && tmux -V | cut -d' ' -f1
"""
    folder = tenant.write_project("hardened", ["bash", "look.sh"], {"look.sh": script})
    done = tenant.run("up", str(folder), "--rm")
    assert (done.code, done.out) == (0, "core 0\ntmux\n")
