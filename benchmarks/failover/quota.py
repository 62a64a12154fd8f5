"""Fills etcd's quota as a runaway writer would, and heals it as docs/operator.md tells operators to, with etcdctl."""

import asyncio
import json
import subprocess
import time
from collections.abc import Sequence

from benchmarks.failover.watch import StoreWatch
from fleet.errors import HostFaultError
from fleet.identity import Role
from fleet.store.port import Delete, Put, StoreUnavailableError
from provisioning.embedded.rackfleet import RackFleet

JUNK = "/junk/"
# Far below etcd's limit of one request, large enough that a small quota is full in seconds.
JUNK_BYTES = 512 * 1024
KEYS_MAX = 2000
RETRY_S = 0.2
# Long enough that leases, budgets and statuses meet a store that takes no writes.
FULL_S = 4.0
COMMAND_TIMEOUT_S = 60.0


async def fill_and_heal(fleet: RackFleet, watch: StoreWatch) -> float:
    """Seconds for which writes were refused; raises HostFaultError `quota_unfilled` or `etcdctl_failed`."""
    keys = await _fill(watch)
    began_s = time.monotonic()
    await asyncio.sleep(FULL_S)
    for key in keys:
        # What only deletes is taken by a full etcd, too.
        await _until_done(watch, key)
    await asyncio.to_thread(_heal, fleet)
    return time.monotonic() - began_s


async def _fill(watch: StoreWatch) -> list[str]:
    keys: list[str] = []
    while len(keys) < KEYS_MAX:
        key = f"{JUNK}{len(keys)}"
        keys.append(key)
        try:
            await watch.store.transact([], [Put(key, bytes(JUNK_BYTES))])
        except StoreUnavailableError as error:
            if error.code == "store_full":
                return keys
            await asyncio.sleep(RETRY_S)
    raise HostFaultError("quota_unfilled", f"{KEYS_MAX} keys did not fill etcd", "give the rack a smaller quota")


async def _until_done(watch: StoreWatch, key: str) -> None:
    while True:
        try:
            await watch.store.transact([], [Delete(key)])
        except StoreUnavailableError:
            await asyncio.sleep(RETRY_S)
        else:
            return


def _heal(fleet: RackFleet) -> None:
    """docs/operator.md, "etcd is full": compact, defragment each member, disarm."""
    status = json.loads(etcdctl(fleet, "endpoint", "status", "--cluster", "--write-out=json"))
    revision = max(one["Status"]["header"]["revision"] for one in status)
    etcdctl(fleet, "compact", str(revision), "--physical")
    etcdctl(fleet, "defrag", "--cluster")
    etcdctl(fleet, "alarm", "disarm")


def etcdctl(fleet: RackFleet, *arguments: str) -> str:
    """What etcdctl prints; raises HostFaultError `etcdctl_failed`."""
    files = fleet.tls(Role.SCHEDULER, next(iter(fleet.schedulers)))
    tls = [f"--cacert={files.ca}", f"--cert={files.certificate}", f"--key={files.key}"]
    command: Sequence[str] = [
        "etcdctl",
        f"--endpoints={','.join(fleet.endpoints)}",
        *tls,
        "--command-timeout=30s",
        *arguments,
    ]
    done = subprocess.run(
        command,
        env={"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise HostFaultError("etcdctl_failed", f"etcdctl {' '.join(arguments)}: {done.stderr.strip()}", "see it")
    return done.stdout
