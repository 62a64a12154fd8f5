"""What must be true whatever happened: nothing lost, nothing twice, and the books agree. Every violation is a sentence."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.failover.load import Kind, Load, Promise
from benchmarks.failover.simulated_host import LIVES
from benchmarks.failover.watch import StoreWatch
from fleet.model.assignment import Sandbox
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal, Phase
from provisioning.embedded.rackfleet import RackFleet

# A guest under emulation on a busy machine, after a fault; only a sandbox that is lost waits as long.
SETTLE_TIMEOUT_S = 240.0
LOOK_S = 0.5
SAMPLE_S = 0.25
_MARK = "guest=bp-"
_RUNS = frozenset({Phase.RUNNING, Phase.COMPLETED})
_HOST_GONE = frozenset({"host_lost", "host_fenced"})
_STOPPED = frozenset({Phase.STOPPED, Phase.COMPLETED, Phase.FAILED})


class VmSampler:
    """Looks at the machine's QEMU processes all the time: two of one sandbox at once are noted."""

    def __init__(self) -> None:
        self.doubles: set[str] = set()
        self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Looks until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the looking."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            found = Counter(running_vms())
            self.doubles |= {name for name, count in found.items() if count > 1}
            self.samples += 1


def running_vms() -> list[str]:
    """The sandbox of each QEMU process on this machine, whatever rack machine it is on."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"qemu-system-x86_64"):
            found += [word.decode().split(_MARK)[1].split(",")[0] for word in words if _MARK.encode() in word]
    return found


async def settle(load: Load) -> list[str]:
    """Waits until every sandbox is as was asked for; what is not by SETTLE_TIMEOUT_S is lost, or in the way."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while found := _unsettled(load, await load.list_all()):
        if time.monotonic() > deadline:
            return found
        await asyncio.sleep(LOOK_S)
    return []


async def violations(fleet: RackFleet, watch: StoreWatch, load: Load, sampler: VmSampler) -> list[str]:
    """What is not true that must be, after `settle`."""
    listed = await load.list_all()
    found = [f"{one}: nobody asked for it" for one in listed if one not in load.promises]
    found += [f"{name}: two VMs at once" for name in sorted(sampler.doubles)]
    found += await watch.wrong_books()
    found += _simulated_violations(fleet, load)
    for sandbox_id, sandbox in listed.items():
        promise = load.promises.get(sandbox_id)
        if promise is not None and promise.kind is Kind.REAL and sandbox.phase is Phase.RUNNING:
            tokens = await _first_tokens(load, sandbox_id)
            load.tokens_seen |= set(tokens)
            if len(tokens) != 1:
                found.append(f"{sandbox_id} on {sandbox.host_id}: its agent has started {len(tokens)} times")
    return found


async def leftovers(watch: StoreWatch, load: Load) -> list[str]:
    """What is left once everything was destroyed."""
    snapshot = await watch.snapshot()
    found = [f"{one}: its record is left" for one in snapshot.records]
    found += [f"{one}: its assignment is left" for one in snapshot.assignments]
    found += [f"{one.host_id}: {one} is left" for one in snapshot.reservations.values() if one.sandboxes]
    return found + [f"{one}: its VM is left" for one in running_vms() if one in load.promises]


async def _first_tokens(load: Load, sandbox_id: SandboxId) -> list[bytes]:
    """What its agent has printed at its start, once it has: it runs before that is here."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        tokens = await load.tokens(sandbox_id)
        if tokens or time.monotonic() > deadline:
            return tokens
        await asyncio.sleep(LOOK_S)


def _unsettled(load: Load, listed: Mapping[SandboxId, Sandbox]) -> list[str]:
    found = []
    for promise in load.promises.values():
        sandbox = listed.get(promise.sandbox_id)
        if promise.goal is Goal.REMOVE:
            found += [f"{promise.sandbox_id} is still there: {_describe(sandbox)}"] if sandbox else []
        elif sandbox is None:
            found += [f"{promise.sandbox_id} is lost"] if promise.is_acknowledged else []
        elif sandbox.phase not in (_RUNS if promise.goal is Goal.RUN else _STOPPED) and not _may_fail(
            load, promise, sandbox
        ):
            found.append(f"{promise.sandbox_id}, to {promise.goal}: {_describe(sandbox)}")
    return found


def _may_fail(load: Load, promise: Promise, sandbox: Sandbox) -> bool:
    """Whether it ended with its host: what does not restart is not started elsewhere."""
    reasons = {one.code for one in (sandbox.reason, sandbox.status and sandbox.status.reason) if one}
    is_over = sandbox.phase is Phase.FAILED and not promise.restarts
    return is_over and sandbox.host_id in load.lost_hosts and bool(reasons & _HOST_GONE)


def _describe(sandbox: Sandbox) -> str:
    reason = sandbox.status.reason if sandbox.status else None
    return f"{sandbox.phase} on {sandbox.host_id or 'no host'}" + (f", {reason.message}" if reason else "")


def _simulated_violations(fleet: RackFleet, load: Load) -> list[str]:
    """Over all simulated hosts each sandbox was started once by each placement, and never lived twice at a time."""
    lives = sorted(
        (json.loads(line) for name in fleet.hosts for line in _lines(fleet.folder / name / "state" / LIVES)),
        key=lambda one: float(one["at_s"]),
    )
    starts = Counter(one["sandbox_id"] for one in lives if one["event"] == "started")
    allowed = {one: promise.placements for one, promise in load.promises.items()}
    found = [
        f"{one}: its domain was started {count} times" for one, count in starts.items() if count > allowed.get(one, 1)
    ]
    living: Counter[str] = Counter()
    for one in lives:
        living[one["sandbox_id"]] += 1 if one["event"] == "started" else -1
        if living[one["sandbox_id"]] > 1:
            found.append(f"{one['sandbox_id']}: two simulated VMs at once")
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
