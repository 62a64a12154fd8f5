"""What hangs is told from what is busy: a VM that was stopped, a guest whose guestd is dead, a guest that burns its CPU."""

import os
import signal
import subprocess
from typing import Any

import pytest

from tests.e2e.operate import Tenant

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

UNRESPONSIVE = "guest_unresponsive"


def _qemu_pid(tenant: Tenant, name: str) -> int:
    pattern = f"guest=bp-{tenant.status(name)['sandbox_id']},"
    return int(subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout)


def _reason(found: Any) -> str:
    return str(found["status"]["reason"]["code"]) if found["status"] and found["status"]["reason"] else ""


def test_a_hung_vm_is_told_and_heals(tenant: Tenant) -> None:
    """SIGSTOP of QEMU: the sandbox runs, but is `guest_unresponsive`; SIGCONT: the reason goes, and no output is lost."""
    script = "i=0; while [ $i -lt 120 ]; do echo line $i; i=$((i+1)); sleep 1; [ ! -e /workspace/end ] || exit 0; done"
    tenant.up(tenant.write_project("hung", ["sh", "-c", script]))
    tenant.until_logged("hung", "line 3\n")
    pid = _qemu_pid(tenant, "hung")
    os.kill(pid, signal.SIGSTOP)
    try:
        told = tenant.until("hung", lambda found: _reason(found) == UNRESPONSIVE)
        assert told["phase"] == "running"
        assert "heard" in told["status"]["reason"]["message"]
    finally:
        os.kill(pid, signal.SIGCONT)
    tenant.until("hung", lambda found: _reason(found) == "")
    assert tenant.run("exec", "hung", "--", "touch", "/workspace/end").code == 0
    ended = tenant.until("hung", lambda found: found["phase"] == "completed")
    lines = tenant.run("logs", "hung").out.splitlines()
    assert lines == [f"line {number}" for number in range(len(lines))]
    assert ended["status"]["agents"][0]["output_bytes"] == sum(len(line) + 1 for line in lines)
    tenant.destroy("hung")


def test_a_hung_vm_can_be_destroyed(tenant: Tenant) -> None:
    """A VM that never answers again is taken down all the same, and nothing of it stays."""
    tenant.up(tenant.write_project("stuck", ["sleep", "3600"]))
    os.kill(_qemu_pid(tenant, "stuck"), signal.SIGSTOP)
    tenant.destroy("stuck")


def test_a_busy_guest_is_not_taken_for_a_hung_one(tenant: Tenant) -> None:
    """Eight loops on one vCPU: heartbeats come through, the sandbox is never called unresponsive, and a program is still run."""
    burn = "for i in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done; echo begun; sleep 50; kill 0"
    tenant.up(tenant.write_project("busy", ["sh", "-c", burn]))
    tenant.until_logged("busy", "begun")
    seen = []
    tenant.until("busy", lambda found: seen.append(_reason(found)) or found["phase"] != "running")
    assert UNRESPONSIVE not in seen
    assert len(seen) > 20
    tenant.destroy("busy")


def test_a_guest_without_guestd_is_told(tenant: Tenant) -> None:
    """guestd killed for good by the guest's root: the guest is not heard of, which is told while its VM runs on."""
    tenant.up(tenant.write_project("mute", ["sleep", "3600"]))
    # Brackets, or the shell would find itself; a second later, so that `mb exec` has its answer.
    tenant.leave_running("mute", "sleep 1; pkill -9 -f [g]uestd-loop; pkill -9 -f [g]uestd.pyz")
    told = tenant.until("mute", lambda found: _reason(found) == UNRESPONSIVE or found["phase"] == "failed")
    assert told["phase"] == "running"
    tenant.destroy("mute")
