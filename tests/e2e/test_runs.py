"""Stop and start: a stopped sandbox keeps its disk, and its next run finds all of it."""

import pytest

from provisioning.embedded.fleet import EmbeddedFleet
from tests.e2e.operate import Tenant

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

# Counts its runs in a source and in the home of its user; the second run ends by itself.
TALLY = """
echo run >>/workspace/tally; echo run >>$HOME/tally
echo "runs: $(wc -l </workspace/tally) $(wc -l <$HOME/tally)"
[ "$(wc -l </workspace/tally)" = 2 ] || exec sleep 3600
"""


def test_a_stopped_sandbox_starts_again_on_its_disk(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """Stop ends the VM and keeps the disk; start runs the agents again on it; output goes on; an ended sandbox is not started."""
    tenant.up(tenant.write_project("again", ["sh", "-c", TALLY]))
    tenant.until_logged("again", "runs: 1 1\n")
    assert tenant.run("stop", "again").code == 0
    stopped = tenant.until("again", lambda found: found["status"]["released"])
    assert (stopped["phase"], stopped["run"]) == ("stopped", 1)
    disk = fleet.folder / "state" / "scratch" / f"{stopped['sandbox_id']}.raw"
    assert disk.exists()
    assert tenant.run("stop", "again").code == 0
    done = tenant.run("start", "again")
    assert done.code == 0, done
    ended = tenant.until("again", lambda found: found["phase"] in ("completed", "failed"))
    assert (ended["phase"], ended["run"]) == ("completed", 2)
    assert tenant.run("logs", "again").out == "runs: 1 1\nruns: 2 2\n"
    assert "+run" in tenant.run("diff", "again").out
    refused = tenant.run("start", "again")
    assert (refused.code, "mb up" in refused.err) == (1, True), refused
    assert tenant.run("stop", "again").code == 0
    assert tenant.status("again")["phase"] == "completed"
    tenant.until("again", lambda found: found["status"]["released"])
    assert not disk.exists()
    tenant.destroy("again")


def test_a_stopped_sandbox_gives_its_memory_back(tenant: Tenant) -> None:
    """A stopped sandbox holds no memory: another takes it; started again it waits for room like any pending one."""
    tenant.up(tenant.write_project("held", ["sleep", "3600"], memory="4GiB"))
    assert tenant.run("stop", "held").code == 0
    tenant.until("held", lambda found: found["status"]["released"])
    tenant.up(tenant.write_project("taker", ["sleep", "3600"], memory="4GiB"))
    assert tenant.run("start", "held").code == 0
    waiting = tenant.until("held", lambda found: found["refusal"] is not None)
    assert (waiting["phase"], waiting["refusal"]["reasons"][0]["code"]) == ("pending", "memory")
    tenant.destroy("taker")
    tenant.until("held", lambda found: found["phase"] == "running" and found["run"] == 2)
    tenant.destroy("held")
