"""Three members of etcd, three schedulers and hosts on machines of their own, while leaders die, sleep and are cut off.

The rounds are those of `./dev bench failover`, which runs fifty of them; here each kind of fault comes once.
"""

import asyncio
import os
import random
from pathlib import Path

import pytest

from benchmarks.failover.faults import FAULTS
from benchmarks.failover.rounds import choose_faults, plan_rack, run_rounds, running_rack
from provisioning.build import ensure_image
from provisioning.recipe import load_recipe

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(1200)]

CACHE = Path(os.environ.get("BEDPLATE_CACHE", "/var/cache/bedplate"))
SEED = 4


def test_nothing_is_lost_and_nothing_twice() -> None:
    """Through each kind of fault: what was acknowledged is there or was destroyed, each agent was started once, sums are sums."""
    assert os.environ.get("BEDPLATE_PRIVATE") == "1", "this test starts a fleet: run it in private namespaces"
    ensure_image(load_recipe("base"), CACHE / "images", CACHE, print)
    chance = random.Random(SEED)
    with running_rack(plan_rack(CACHE / "images", real=2, simulated=2), print) as fleet:
        found = asyncio.run(run_rounds(fleet, chance, choose_faults(chance, len(FAULTS)), print))
    assert [one["problems"] for one in found["rounds"]] == [[]] * len(FAULTS), found
    assert found["left at the end"] == []
    measured = {one["fault"] for one in found["rounds"] if one["report"]["failover"]}
    assert {"kill_leader", "pause_leader", "isolate_leader", "kill_etcd_leader"} <= measured
    assert found["starts of real guests"] > 0
