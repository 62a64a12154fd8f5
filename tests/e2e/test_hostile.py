"""Guests that belong to their attacker: each harms nobody but itself, while a bystander on the same host loses nothing."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from provisioning.embedded.fleet import EmbeddedFleet
from tests.e2e.operate import Running, Tenant, wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

HOSTILE = (Path(__file__).parent / "hostile_guest.py").read_text()
COUNT = 40
BYSTANDER = f"""
import time
for number in range({COUNT}):
    print("line", number, flush=True)
    time.sleep(0.5)
"""
COUNTED = "".join(f"line {number}\n" for number in range(COUNT))
# Files of a console: the current one and one backup of 1 MiB each (provisioning.embedded.libvirt), and a write under way.
CONSOLE_BYTES_MAX = 3 * 1024 * 1024


@contextmanager
def unharmed(tenant: Tenant) -> Iterator[None]:
    """Within it a bystander runs, which must complete with every line of its output."""
    folder = tenant.write_project("bystander", ["python3", "count.py"], {"count.py": BYSTANDER})
    with tenant.start("up", str(folder)) as up:
        up.until_printed("line 2\n")
        yield
        _assert_counted(up)
    tenant.destroy("bystander")


def _assert_counted(up: Running) -> None:
    done = up.wait()
    assert (done.code, done.out) == (0, COUNTED), done


def _take_over(tenant: Tenant, name: str, mode: str) -> None:
    """A sandbox whose guest runs hostile_guest.py in the place of guestd."""
    folder = tenant.write_project(name, ["sh", "-c", "echo begun; exec sleep 3600"], {"hostile_guest.py": HOSTILE})
    tenant.up(folder)
    tenant.until_logged(name, "begun")
    tenant.leave_running(name, f"sleep 1; exec python3 /workspace/hostile_guest.py {mode}")


def test_guests_that_break_the_protocol_fail_alone(tenant: Tenant) -> None:
    """Garbage frames, giant names, an agent that changes its state without end: each fails with `guest_link_broken`."""
    modes = ("garbage", "names", "flips")
    with unharmed(tenant):
        for mode in modes:
            _take_over(tenant, mode, mode)
        for mode in modes:
            ended = tenant.until(mode, lambda found: found["phase"] == "failed")
            assert ended["status"]["reason"]["code"] == "guest_link_broken", ended["status"]
        tenant.destroy(*modes)


def test_a_guest_that_floods_the_link_slows_nobody(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """Heartbeats and unknown frames as fast as they go: the host answers others as before and its memory does not grow."""
    with unharmed(tenant):
        _take_over(tenant, "flood", "flood")
        started = time.monotonic()
        before = _resident_mib(fleet.hostd.pid)
        for _ in range(10):
            assert tenant.run("ls").code == 0
        assert tenant.run("exec", "bystander", "--", "true").code == 0
        assert time.monotonic() - started < 120
        assert _resident_mib(fleet.hostd.pid) < before + 64
        tenant.destroy("flood")


def test_an_artifact_that_climbs_is_refused(tenant: Tenant, tmp_path: Path) -> None:
    """Zip-slip and a file behind a symlink: `mb get` and `mb diff` refuse the whole artifact and write nothing."""
    _take_over(tenant, "artifact", "artifact")
    tenant.until("artifact", lambda found: found["status"]["artifact"] is not None or found["phase"] == "failed")
    target = tmp_path / "deep" / "er" / "target"
    for arguments in (("get", "artifact", str(target)), ("diff", "artifact")):
        done = tenant.run(*arguments)
        assert (done.code, "tar_invalid" in done.err or "refused" in done.err or done.code != 0) == (2, True), done
    assert not list(tmp_path.rglob("evil"))
    assert not Path("/tmp/evil").exists()
    tenant.destroy("artifact")


def test_a_fork_bomb_hits_its_own_limit(tenant: Tenant) -> None:
    """An agent that forks without end meets its pid_limit; its guest still answers, and it is ended like any other."""
    bomb = "import os\nprint('begun', flush=True)\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    with unharmed(tenant):
        tenant.up(tenant.write_project("bomb", ["python3", "bomb.py"], {"bomb.py": bomb}, agent="pid_limit = 64"))
        tenant.until_logged("bomb", "begun")
        counted = tenant.run(
            "exec", "--user", "root", "bomb", "--", "cat", "/sys/fs/cgroup/bedplate/agent-worker/pids.current"
        )
        assert 1 <= int(counted.out) <= 64, counted
        assert tenant.run("stop", "bomb").code == 0
        assert tenant.until("bomb", lambda found: found["status"]["released"])["phase"] == "stopped"
        tenant.destroy("bomb")


def test_a_console_flood_is_bounded(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """Root in the guest writes to the console without end: its log on the host stays within two files of a MiB."""
    with unharmed(tenant):
        tenant.up(tenant.write_project("noisy", ["sleep", "3600"]))
        tenant.leave_running("noisy", "yes this goes to the console >/dev/ttyS0")
        logs = fleet.folder / "log"
        pattern = f"{tenant.status('noisy')['sandbox_id']}.console*"
        wait_until(lambda: sum(path.stat().st_size for path in logs.glob(pattern)), lambda size: size > 1024 * 1024)
        time.sleep(5)  # it goes on writing: what is looked at is that nothing grows
        assert sum(path.stat().st_size for path in logs.glob(pattern)) < CONSOLE_BYTES_MAX
        tenant.destroy("noisy")
        assert list(logs.glob(pattern)) == []


def test_a_full_guest_disk_ends_clearly(tenant: Tenant) -> None:
    """An agent that fills its disk meets ENOSPC; its end and what it printed before are told, and its changes are packed or the
    reason is said."""
    script = (
        "echo before; head -c 1G /dev/zero >/workspace/big; code=$?; rm -f /workspace/big; echo after $code; exit 5"
    )
    folder = tenant.write_project("filled", ["sh", "-c", script], disk="128MiB")
    done = tenant.run("up", str(folder))
    assert done.code == 3, done
    assert re.search(r"before\n.*after 1\n", done.out, re.DOTALL), done
    (agent,) = tenant.status("filled")["status"]["agents"]
    assert agent["exit_code"] == 5
    tenant.destroy("filled")


def _resident_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024  # type: ignore[index]
