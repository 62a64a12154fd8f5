"""A disk that is kept: stopped with a clean power-off, started again by another boot, with secrets that are on no disk."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.model.sandbox import Agent, Goal
from hostd.drivers.ports import LinkMessage
from tests.integration.guestd.parts import A, Boot, Host, Site, launch, pack_tree

pytestmark = [pytest.mark.root, pytest.mark.vm]

SECRET = b"s3cr3t-value-that-is-nowhere"
AGENT = """
echo run >>/workspace/runs; cat /workspace/runs; echo home >>~/kept; wc -l <~/kept
stat -c '%a %U' /run/secrets /run/secrets/TOKEN 2>&1
[ "$(wc -c <"$TOKEN_FILE")" = 28 ] && echo whole
exec sleep 10000
"""


async def _run(host: Host) -> None:
    await host.until(lambda: host.links.of_type("hello") != [])
    hello = host.links.of_type("hello")[0]
    assert hello.fields["configured"] is False
    await host.until(lambda: host.output("a").endswith(b"whole\n"))
    await host.links.send(A, LinkMessage("stop", {"grace_period_s": 0}))
    await host.until(lambda: any(agent.ended_at_ms for agent in host.progress.agents))
    await host.links.send(A, LinkMessage("poweroff"))


async def test_a_kept_disk_begins_a_new_run(boot: Boot, tmp_path: Path) -> None:
    """What agents wrote is there in the next run, guestd's own state is not; the filesystem is clean, and no secret is in it."""
    site = Site(boot, tmp_path)
    vm, order = await site.start(
        [(pack_tree({"a.txt": "a\n"}), "/workspace", False)], [Agent("a", "custom", ("sh", "-c", AGENT))]
    )
    order = replace(order, spec=replace(order.spec, secrets=("TOKEN",)), goal=Goal.RUN)
    scratch = next((tmp_path / "scratch").rglob("*.ext4"), None) or next(
        path for path in (tmp_path / "scratch").rglob("*") if path.is_file() and path.stat().st_size > 1 << 20
    )
    disks = [str(path) for path in (tmp_path / "sources").rglob("*.erofs")]
    outputs = []
    for run in (1, 2):
        host = Host(tmp_path / f"state-{run}", vm, order)
        try:
            await host.sessions.take_secrets(order, [("TOKEN", SECRET)])
            await _run(host)
            assert await vm.wait() == 0
        finally:
            await host.crash()
        outputs.append(host.output("a").decode().splitlines())
        checked = subprocess.run(["e2fsck", "-n", "-f", str(scratch)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
        assert "recovering journal" not in checked.stdout + checked.stderr
        assert SECRET not in scratch.read_bytes()
        assert SECRET.decode() not in vm.console()
        if run == 1:
            (tmp_path / "second").mkdir()
            vm = launch(boot, tmp_path / "second", str(scratch), disks)
            site.vms.append(vm)
    site.close()
    secrets = ["500 agent", "400 agent", "whole"]
    assert outputs == [["run", "1", *secrets], ["run", "run", "2", *secrets]]
