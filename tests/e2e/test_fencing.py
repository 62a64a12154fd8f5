"""A host that cannot renew its lease: its VM is paused, runs on when the lease is back in time, and ends when it is not."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleet.model.sandbox import ENDED_PHASES
from provisioning.embedded.fleet import EmbeddedFleet
from provisioning.embedded.libvirt import LIBVIRT_URI
from tests.e2e.operate import COUNTED, COUNTER, Tenant, wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]


def domain_state(sandbox_id: str) -> str:
    """What libvirt says of the sandbox's domain, without hostd; empty when there is none."""
    arguments = ["virsh", "--connect", LIBVIRT_URI, "domstate", f"bp-{sandbox_id}"]
    return subprocess.run(arguments, capture_output=True, text=True, check=False).stdout.strip()


def has_vm(sandbox_id: str) -> bool:
    """Whether a QEMU of the sandbox is there."""
    return subprocess.run(["pgrep", "-f", f"guest=bp-{sandbox_id},"], capture_output=True, check=False).returncode == 0


@contextmanager
def without_etcd(fleet: EmbeddedFleet) -> Iterator[None]:
    """Within it etcd answers nobody."""
    fleet.etcd.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        fleet.etcd.signal(signal.SIGCONT)


def reason_of(tenant: Tenant, name: str) -> str:
    ended = tenant.until(name, lambda found: found["phase"] in ENDED_PHASES and found["status"]["released"])
    assert ended["phase"] == "failed"
    return str(ended["status"]["reason"]["code"])


def test_a_store_that_is_back_in_time_costs_a_pause(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """Nothing runs while the lease may have ended; then the same VM runs on, and not a line is lost."""
    folder = tenant.write_project("pauses", ["python3", "count.py"], {"count.py": COUNTER})
    with tenant.start("up", str(folder)) as up:
        up.until_printed("line 5\n")
        sandbox_id = tenant.status("pauses")["sandbox_id"]
        with without_etcd(fleet):
            wait_until(lambda: domain_state(sandbox_id), lambda state: state == "paused")
        wait_until(lambda: domain_state(sandbox_id), lambda state: state == "running")
        done = up.wait()
    assert (done.code, done.out) == (0, COUNTED), done
    tenant.destroy("pauses")


def test_a_store_that_stays_away_ends_the_sandbox(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """Cut off for longer, the host kills its VM by itself and says so once it can; a new sandbox runs as ever."""
    folder = tenant.write_project("fenced", ["sleep", "600"])
    tenant.up(folder)
    sandbox_id = tenant.status("fenced")["sandbox_id"]
    with without_etcd(fleet):
        wait_until(lambda: has_vm(sandbox_id), lambda is_there: not is_there)
    assert reason_of(tenant, "fenced") == "host_fenced"
    tenant.destroy("fenced")
    again = tenant.write_project("again", ["echo", "here"])
    done = tenant.run("up", str(again), "--rm")
    assert (done.code, done.out) == (0, "here\n"), done


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
def test_a_hostd_that_is_stuck_or_dead_runs_nothing_on(
    tenant: Tenant, fleet: EmbeddedFleet, blow: signal.Signals
) -> None:
    """The guard kills the VM of a hostd that cannot; when hostd is back it knows why, and starts no agent again."""
    name = f"guarded-{blow.name.lower()}"
    tenant.up(tenant.write_project(name, ["sleep", "600"]))
    sandbox_id = tenant.status(name)["sandbox_id"]
    fleet.hostd.signal(blow)
    wait_until(lambda: has_vm(sandbox_id), lambda is_there: not is_there)
    if blow is signal.SIGSTOP:
        fleet.hostd.signal(signal.SIGCONT)
    else:
        fleet.hostd.process.wait()
        fleet.start_hostd()
    assert reason_of(tenant, name) == "host_fenced"
    tenant.destroy(name)


def test_a_guard_that_is_killed_is_followed(fleet: EmbeddedFleet) -> None:
    """hostd starts another at its next renewal."""
    lock = fleet.folder / "run" / "guard" / "lock"
    before = int(lock.read_text())
    os.kill(before, signal.SIGKILL)
    after = wait_until(lambda: lock.read_text().strip(), lambda text: text not in ("", str(before)))
    assert "hostd.guard" in Path(f"/proc/{after}/cmdline").read_text()
