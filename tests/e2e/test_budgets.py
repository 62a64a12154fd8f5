"""Budgets in real VMs: what is used up is stopped with its grace, and every millisecond is charged once, whoever dies meanwhile."""

from typing import Any

import pytest

from fleet.codec import decode
from fleet.model.budget import MeterBook
from provisioning.embedded.fleet import EmbeddedFleet
from tests.e2e.operate import Tenant, wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

LIMIT_MS = 60_000
# Writes something when it is asked to end, so that its grace can be seen in the artifact.
SPENDER = """
trap 'echo asked >/workspace/grace; echo bye; exit 0' TERM
echo begun
while :; do sleep 0.2; done
"""
BUDGET = f"""
[budget]
account = "spree"
[limits]
wall_clock = "{LIMIT_MS // 1000}s"
"""


def _metered(fleet: EmbeddedFleet, sandbox_id: str) -> dict[str, int]:
    """What the host has measured, by its own disk."""
    book = decode(MeterBook, (fleet.folder / "state" / "meter").read_bytes())
    (entry,) = [entry for entry in book.meter.entries if entry.sandbox_id == sandbox_id]
    assert entry.accounts == (f"~{sandbox_id}", "spree", "")
    return {"wall_ms": entry.used.wall_ms, "vcpu_ms": entry.used.vcpu_ms}


def _spent(tenant: Tenant, account: str) -> dict[str, int]:
    found: Any = tenant.run("budget", "show", account, "--json").json()["spent"]
    return {"wall_ms": found["wall_ms"], "vcpu_ms": found["vcpu_ms"]}


def test_what_is_used_up_is_stopped_and_charged_once(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """A minute of VM, with hostd and scheduler killed: stopped after its grace with `budget_exhausted`, its artifact kept; its
    accounts have spent exactly what the host has metered, also once it is destroyed; it is not started again."""
    made = tenant.run("budget", "set", "spree", "--sandboxes", "1")
    assert made.code == 0, made
    before = _spent(tenant, "")
    folder = tenant.write_project("spender", ["sh", "-c", SPENDER])
    with (folder / "jcard.toml").open("a") as jcard:
        jcard.write(BUDGET)
    tenant.up(folder)
    tenant.until_logged("spender", "begun\n")
    fleet.hostd.kill()
    fleet.start_hostd()
    fleet.scheduler.kill()
    fleet.start_scheduler()
    stopped = tenant.until("spender", lambda found: found["phase"] == "stopped" and found["status"]["released"])
    sandbox_id = stopped["sandbox_id"]
    assert (stopped["goal"], stopped["reason"]["code"]) == ("stop", "budget_exhausted")
    assert f"sandbox {sandbox_id}" in stopped["reason"]["message"]
    assert "wall_clock" in stopped["reason"]["message"]
    assert stopped["status"]["artifact"]["changes"] == 1
    # The shell says that its sleep was ended.
    assert tenant.run("logs", "spender").out == "begun\nTerminated\nbye\n"

    own = f"~{sandbox_id}"
    wait_until(lambda: (_spent(tenant, own), _metered(fleet, sandbox_id)), lambda both: both[0] == both[1])
    metered = _metered(fleet, sandbox_id)
    assert metered["wall_ms"] >= LIMIT_MS
    assert _spent(tenant, "spree") == metered
    assert _spent(tenant, "") == {name: before[name] + used for name, used in metered.items()}
    refused = tenant.run("start", "spender")
    assert (refused.code, "wall_clock" in refused.err) == (1, True), refused

    tenant.destroy("spender")
    assert _spent(tenant, "spree") == metered
    assert tenant.run("budget", "rm", "spree").code == 0
