"""What breaks, breaks one thing only: hostd and scheduler are killed, images and sources damaged, a guest is hostile."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from fleet.errors import HostFaultError
from fleet.model.sandbox import ENDED_PHASES
from provisioning.embedded.fleet import EmbeddedFleet, run_hostd
from tests.e2e.operate import Tenant, wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

COUNT = 40
COUNTER = f"""
import time
for number in range({COUNT}):
    print("line", number, flush=True)
    time.sleep(0.25)
open("total", "w").write("{COUNT}\\n")
"""
COUNTED = "".join(f"line {number}\n" for number in range(COUNT))


def _refusal(fleet: EmbeddedFleet, command: str) -> str:
    """What one more hostd says when it is refused."""
    with pytest.raises(HostFaultError) as caught:
        run_hostd(fleet.folder, command)
    return caught.value.message


def _qemu_pid(tenant: Tenant, name: str) -> int:
    pattern = f"guest=bp-{tenant.status(name)['sandbox_id']},"
    return int(subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout)


def test_a_killed_hostd_loses_nothing(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """kill -9 of hostd in mid-run: the VM never stops, the next hostd adopts it, output is whole and the status right."""
    folder = tenant.write_project("adopted", ["python3", "count.py"], {"count.py": COUNTER})
    with tenant.start("up", str(folder)) as up:
        up.until_printed("line 5\n")
        before = _qemu_pid(tenant, "adopted")
        assert "another hostd uses" in _refusal(fleet, "serve")
        fleet.hostd.kill()
        assert "still has 1 VM" in _refusal(fleet, "retire")
        fleet.start_hostd()
        assert _qemu_pid(tenant, "adopted") == before
        done = up.wait()
    assert (done.code, done.out) == (0, COUNTED), done
    assert tenant.run("logs", "adopted").out == COUNTED
    status = tenant.status("adopted")
    assert (status["phase"], status["status"]["artifact"]["changes"]) == ("completed", 1)
    tenant.destroy("adopted")


def test_a_host_that_lost_its_state_runs_no_agent_twice(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """With the state folder gone and etcd whole the sandbox has failed, its VM is gone, and no other is started for it."""
    folder = tenant.write_project("forgotten", ["python3", "count.py"], {"count.py": COUNTER})
    with tenant.start("up", str(folder)) as up:
        up.until_printed("line 5\n")
        sandbox_id = tenant.status("forgotten")["sandbox_id"]
        fleet.hostd.kill()
        for name in ("orders", "sandboxes"):
            shutil.rmtree(fleet.folder / "state" / name)
        fleet.start_hostd()
        up.wait()
    status = wait_until(lambda: tenant.status("forgotten"), lambda found: found["phase"] in ENDED_PHASES)
    assert (status["phase"], status["status"]["reason"]["code"]) == ("failed", "state_lost")
    wait_until(lambda: _count_vms(sandbox_id), lambda count: count == 0)
    tenant.destroy("forgotten")


def _count_vms(sandbox_id: str) -> int:
    found = subprocess.run(["pgrep", "-f", f"guest=bp-{sandbox_id},"], capture_output=True, text=True, check=False)
    return len(found.stdout.split())


def test_a_killed_scheduler_is_waited_for(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """kill -9 of the scheduler in mid-run: `mb up` goes on by itself when there is one again, without losing a line."""
    folder = tenant.write_project("patient", ["python3", "count.py"], {"count.py": COUNTER})
    with tenant.start("up", str(folder)) as up:
        up.until_printed("line 5\n")
        fleet.scheduler.kill()
        fleet.start_scheduler()
        done = up.wait()
    assert (done.code, done.out) == (0, COUNTED), done
    tenant.destroy("patient")


def test_a_killed_etcd_is_waited_for(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """kill -9 of etcd in mid-run: output flows on without it, and when it is back the host is alive and the status right."""
    folder = tenant.write_project("storeless", ["python3", "count.py"], {"count.py": COUNTER})
    with tenant.start("up", str(folder)) as up:
        up.until_printed("line 5\n")
        fleet.etcd.kill()
        up.until_printed("line 15\n")
        fleet.start_etcd()
        done = up.wait()
    assert (done.code, done.out) == (0, COUNTED), done
    assert tenant.until("storeless", lambda found: found["status"]["released"])["phase"] == "completed"
    tenant.destroy("storeless")


def test_a_restarted_libvirt_is_found_again(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """libvirtd may be restarted for an update: VMs run on, hostd connects again, and the sandbox ends as ever."""
    folder = tenant.write_project("libvirt", ["python3", "count.py"], {"count.py": COUNTER})
    with tenant.start("up", str(folder)) as up:
        up.until_printed("line 5\n")
        before = _qemu_pid(tenant, "libvirt")
        fleet.libvirt.restart_daemon()
        assert _qemu_pid(tenant, "libvirt") == before
        done = up.wait()
    assert (done.code, done.out) == (0, COUNTED), done
    tenant.destroy("libvirt")


def test_a_host_starts_without_its_libvirt(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """With libvirtd away hostd ends and starts in order, says what is wrong, and runs what was ordered once libvirtd is back."""
    folder = tenant.write_project("early", ["echo", "late but whole"])
    fleet.libvirt.daemon.stop()
    try:
        fleet.hostd.stop()
        assert fleet.hostd.process.returncode == 0, fleet.hostd.log_tail()
        said = len(fleet.hostd.log.read_text())
        fleet.start_hostd()
        wait_until(lambda: fleet.hostd.log.read_text()[said:], lambda log: '"domains_unlisted"' in log)
        assert tenant.run("up", str(folder), "--detach").code == 0
    finally:
        fleet.libvirt.restart_daemon()
    ended = tenant.until("early", lambda found: found["phase"] in ENDED_PHASES)
    assert (ended["phase"], tenant.run("logs", "early").out) == ("completed", "late but whole\n")
    tenant.destroy("early")


def test_a_vm_that_dies_is_told_and_not_started_again(tenant: Tenant) -> None:
    """A VM that ends under its agents fails its sandbox with the reason: an agent never runs twice behind its owner's back."""
    folder = tenant.write_project("dies", ["sh", "-c", "echo begun; exec sleep 600"])
    with tenant.start("up", str(folder)) as up:
        up.until_printed("begun")
        os.kill(_qemu_pid(tenant, "dies"), signal.SIGKILL)
        done = up.wait()
    assert (done.code, done.out) == (3, "begun\n")
    status = tenant.status("dies")
    assert (status["phase"], status["status"]["reason"]["code"]) == ("failed", "vm_died")
    tenant.destroy("dies")


def test_guest_root_cannot_write_to_the_source(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """A guest that is hostile from its first instruction on, with all of root's power, writes its scratch disk and no other."""
    folder = tenant.write_project("hostile", ["true"], mixtape="hostile:latest")
    assert tenant.run("up", str(folder)).code == 3
    status = tenant.status("hostile")
    assert status["status"]["reason"]["code"] == "vm_unstartable"
    console = (fleet.folder / "log" / f"{status['sandbox_id']}.console").read_text(errors="replace")
    outcomes = set(re.findall(r"hostile: (\S+) was (\w+)", console))
    assert outcomes == {("root", "refused"), ("scratch", "written"), ("source-0", "refused")}, console[-3000:]
    disk = _source_disk(fleet, status["spec"]["sources"][0]["digest"].removeprefix("sha256:"))
    digest = "sha256:" + hashlib.sha256(disk.read_bytes()).hexdigest()
    assert (disk.parent / "disk.digest").read_text() == digest
    tenant.destroy("hostile")


def test_a_damaged_source_is_refused(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """One flipped byte in a source on the host: the next sandbox is refused, naming the file and what to do."""
    folder = tenant.write_project("flipped", ["cat", "text"], {"text": "as it was sent\n"})
    first = tenant.run("up", str(folder), "--rm", "--json").json()
    _flip_byte(_source_disk(fleet, first["spec"]["sources"][0]["digest"].removeprefix("sha256:")))
    done = tenant.run("up", str(folder))
    assert (done.code, done.out) == (3, "")
    reason = tenant.status("flipped")["status"]["reason"]
    assert (reason["code"], "disk.erofs" in reason["message"], bool(reason["next_step"])) == (
        "source_corrupt",
        True,
        True,
    )
    assert "source_corrupt" in tenant.run("status", "flipped").out
    tenant.destroy("flipped")
    again = tenant.run("up", str(folder), "--rm")
    assert (again.code, again.out, "sent" in again.err) == (0, "as it was sent\n", True)


def test_a_damaged_image_is_refused(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """One flipped byte in an image that the host has registered: no VM boots from it, and the reason names the file."""
    hosts = wait_until(
        lambda: Tenant(fleet, tenant.folder, fleet.operator_config).run("host", "ls", "--json").json(), bool
    )
    digest = next(image["digest"] for image in hosts[0]["record"]["images"] if image["name"] == "damaged:latest")
    images_dir = fleet.folder.parent / "images"
    root = images_dir / digest.replace(":", "-", 1) / "root.erofs"
    _flip_byte(root)
    try:
        folder = tenant.write_project("refused", ["true"], mixtape="damaged:latest")
        done = tenant.run("up", str(folder), "--detach")
        assert done.code == 0, done
        status = tenant.until("refused", lambda found: found["phase"] in ("failed", "pending") and _is_told(found))
        told = status["status"]["reason"] if status["phase"] == "failed" else status["refusal"]["reasons"][0]
        # The host stops offering an image that it has found damaged; whichever comes first, no VM was started from it.
        assert told["code"] in ("image_corrupt", "image_unknown"), told
        assert status["status"] is None or "root.erofs" in told["message"]
        wait_until(fleet.hostd.log.read_text, lambda log: '"image.refused"' in log and "root.erofs" in log)
        tenant.destroy("refused")
    finally:
        # Whoever looks at the host later finds it whole.
        _flip_byte(root)


def _is_told(found: dict[str, object]) -> bool:
    return found["phase"] == "failed" or found["refusal"] is not None


def _source_disk(fleet: EmbeddedFleet, digest_hex: str) -> Path:
    (found,) = (fleet.folder / "state" / "sources").glob(f"*/{digest_hex}/disk.erofs")
    return found


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
