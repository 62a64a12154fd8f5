"""Leadership on a real etcd: a leader whose process was stopped writes nothing more, and one that ends gives way at once."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from fleet.identity import Role
from fleet.store.election import Election
from fleet.store.etcd import open_etcd
from fleet.store.port import Put
from provisioning.embedded.etcd import LOOPBACK, free_ports, start_etcd
from provisioning.embedded.pki import create_pki, tls_files
from tests.integration.fleet.candidate import TTL_S

HANG_S = 30.0
# More lines than it can have had in its pipe when it was stopped, each written after it went on.
LINES = 20


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[str]:
    """A real etcd's endpoint; its certificates are in tmp_path/pki."""
    create_pki(tmp_path / "pki")
    ports = free_ports(2)
    program = start_etcd(tmp_path / "etcd", tmp_path / "pki", *ports)
    yield f"{LOOPBACK}:{ports[0]}"
    program.stop()


@pytest.mark.root
async def test_a_leader_stopped_past_its_lease_writes_nothing(etcd: str, tmp_path: Path) -> None:
    """SIGSTOP in the middle of its writes, another wins, SIGCONT: no write of the first is younger than the second's term."""
    store = open_etcd([etcd], tls_files(tmp_path / "pki", Role.SCHEDULER, "scheduler"))
    command = [sys.executable, "-m", "tests.integration.fleet.candidate", etcd, str(tmp_path / "pki"), "/test/"]
    zombie = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert zombie.stdout is not None
    second = Election(store, "/test/leader", "second", TTL_S, monotonic)
    runners = []
    try:
        async with asyncio.timeout(HANG_S):
            assert await zombie.stdout.readline() == b"written\n"
            zombie.send_signal(signal.SIGSTOP)
            runners.append(asyncio.create_task(second.run()))
            await second.wait_until_leading()
            fence = second.fence()
            assert fence is not None
            zombie.send_signal(signal.SIGCONT)
            heard = []
            while heard[-LINES:] != [b"refused\n"] * LINES:
                heard.append(await zombie.stdout.readline())
            last = await store.get("/test/written")
            assert last is not None
            assert last.mod_revision < fence.mod_revision
            assert (await store.transact([fence], [Put("/test/second", b"")])).is_committed
    finally:
        zombie.kill()
        await zombie.wait()
        for runner in runners:
            runner.cancel()
            await asyncio.wait({runner})
        await store.close()


@pytest.mark.root
async def test_a_leader_that_ends_in_order_resigns_at_once(etcd: str, tmp_path: Path) -> None:
    """A leadership of an hour is free as soon as its holder is told to end: nobody waits for its lease."""
    store = open_etcd([etcd], tls_files(tmp_path / "pki", Role.SCHEDULER, "scheduler"))
    first, second = (Election(store, "/test/leader", name, 3600.0, monotonic) for name in ("first", "second"))
    runners = [asyncio.create_task(first.run())]
    async with asyncio.timeout(HANG_S):
        await first.wait_until_leading()
        runners.append(asyncio.create_task(second.run()))
        runners[0].cancel()
        await second.wait_until_leading()
    for runner in runners:
        runner.cancel()
    await asyncio.wait(runners)
    await store.close()
