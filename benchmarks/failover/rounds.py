"""Rounds on one fleet: clients ask, a fault strikes in the middle, it is mended, and everything must be true again."""

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.failover.checks import VmSampler, leftovers, settle, violations
from benchmarks.failover.faults import FAULTS, Report, Scene
from benchmarks.failover.load import Kind, Load
from benchmarks.failover.watch import StoreWatch
from fleet.errors import BedplateError
from fleet.identity import Role
from fleet.model.ids import SandboxId
from fleet.model.sandbox import Goal
from mb.client import open_client
from mb.config import ClientConfig
from provisioning.embedded.pki import EMBEDDED_TENANT
from provisioning.embedded.rackfleet import HostPlan, RackFleet, RackPlan

# Asked for at the beginning of each round; more come while a failover is measured.
SIMULATED_PER_ROUND = 4
# Guests under emulation at once: a VM takes a core while it boots.
REAL_MAX = 2
# Kept from round to round, so that old sandboxes meet new faults.
KEPT = 12
# Small, so that it is full in seconds; large enough for the history of all rounds.
QUOTA_BYTES = 96 * 1024**2
SIMULATED_HOST = "benchmarks.failover.simulated_host"


@dataclass(frozen=True, slots=True)
class Round:
    """What a round did and found."""

    number: int
    fault: str
    report: Report
    duration_s: float
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As a table of JSON."""
        return {**asdict(self), "problems": list(self.problems)}


def plan_rack(images_dir: Path, real: int, simulated: int) -> RackPlan:
    """Three members of etcd, three schedulers, and so many hosts with real and with simulated guests."""
    reals = [HostPlan(f"host-{n + 1}", 2, 1024, labels=(("kind", Kind.REAL),)) for n in range(real)]
    simulateds = [
        HostPlan(f"sim-{n + 1}", 64, 16384, SIMULATED_HOST, has_libvirt=False, labels=(("kind", Kind.SIMULATED),))
        for n in range(simulated)
    ]
    return RackPlan(images_dir, (*reals, *simulateds), quota_bytes=QUOTA_BYTES)


def choose_faults(chance: random.Random, rounds: int, names: Sequence[str] = tuple(FAULTS)) -> list[str]:
    """The faults of so many rounds: each comes as often as every other, in the seed's order."""
    chosen: list[str] = []
    while len(chosen) < rounds:
        chosen += chance.sample(list(names), len(names))
    return chosen[:rounds]


async def run_rounds(
    fleet: RackFleet,
    chance: random.Random,
    faults: Sequence[str],
    tell: Callable[[Round], None],
    limit_s: float = float("inf"),
) -> dict[str, Any]:
    """Runs a round for each of `faults` on a fleet that is well, none after `limit_s`, then destroys everything; what was found."""
    ends_s = time.monotonic() + limit_s
    sampler, rounds = VmSampler(), []
    async with _open_scene(fleet, chance) as scene:
        sampler.start()
        try:
            for number, name in enumerate(faults, 1):
                if time.monotonic() > ends_s:
                    break
                done = await _run_round(scene, number, name, sampler)
                rounds.append(done)
                tell(done)
                await _thin_out(scene)
            left = await _end(scene)
        finally:
            sampler.stop()
    return {
        "rounds": [one.to_json() for one in rounds],
        "sandboxes": len(scene.load.promises),
        "starts of real guests": len(scene.load.tokens_seen),
        "requests repeated": scene.load.retries,
        "slowest acknowledgement, seconds": round(scene.load.slowest_s, 3),
        "looks at running VMs": sampler.samples,
        "left at the end": left,
    }


async def _run_round(scene: Scene, number: int, name: str, sampler: VmSampler) -> Round:
    began_s = time.monotonic()
    scene.unanswered.append(asyncio.create_task(_ask(scene)))
    report, problems = Report(f"{name}: it did not come to its end"), []
    try:
        report = await FAULTS[name](scene)
    except (BedplateError, TimeoutError) as error:
        problems.append(f"{name}: {error!r}")
    await _mend(scene.fleet)
    answers = await asyncio.gather(*scene.unanswered, return_exceptions=True)
    problems += [f"a request failed: {one!r}" for one in answers if isinstance(one, BaseException)]
    scene.unanswered.clear()
    problems += [*await settle(scene.load), *await violations(scene.fleet, scene.watch, scene.load, sampler)]
    return Round(number, name, report, round(time.monotonic() - began_s, 1), tuple(problems))


async def _ask(scene: Scene) -> None:
    """New sandboxes, and an end to some that run."""
    load, chance = scene.load, scene.chance
    reals = [one for one in _running(load) if load.promises[one].kind is Kind.REAL]
    kinds = [Kind.SIMULATED] * SIMULATED_PER_ROUND
    kinds += [Kind.REAL] if scene.fleet.libvirts and len(reals) < REAL_MAX else []
    simulated = [one for one in _running(load) if load.promises[one].kind is Kind.SIMULATED]
    ending = [*reals[: len(reals) + 1 - REAL_MAX], *chance.sample(simulated, min(len(simulated), 3))]
    async with asyncio.TaskGroup() as group:
        for kind in kinds:
            group.create_task(load.create(kind))
        for index, sandbox_id in enumerate(ending):
            group.create_task(load.stop(sandbox_id) if index % 2 else load.destroy(sandbox_id))


async def _mend(fleet: RackFleet) -> None:
    """Nothing is cut, paused or down any more, and all is well."""
    await asyncio.to_thread(fleet.rack.heal)
    for unit in fleet.units():
        unit.resume()
    fleet.start_what_is_down()
    await asyncio.to_thread(fleet.wait_well)


async def _thin_out(scene: Scene) -> None:
    """Most of the simulated sandboxes, and all that have stopped, are destroyed."""
    load = scene.load
    running = [one for one in _running(load) if load.promises[one].kind is Kind.SIMULATED]
    stopped = [one for one, promise in load.promises.items() if promise.goal is Goal.STOP]
    async with asyncio.TaskGroup() as group:
        for sandbox_id in (*running[: max(0, len(running) - KEPT)], *stopped):
            group.create_task(load.destroy(sandbox_id))


async def _end(scene: Scene) -> list[str]:
    load = scene.load
    async with asyncio.TaskGroup() as group:
        for sandbox_id, promise in load.promises.items():
            if promise.goal is not Goal.REMOVE:
                group.create_task(load.destroy(sandbox_id))
    return [*await settle(load), *await leftovers(scene.watch, load)]


def _running(load: Load) -> list[SandboxId]:
    return [one for one, promise in load.promises.items() if promise.goal is Goal.RUN and promise.is_acknowledged]


@asynccontextmanager
async def _open_scene(fleet: RackFleet, chance: random.Random) -> AsyncIterator[Scene]:
    tls = fleet.tls(Role.TENANT, EMBEDDED_TENANT)
    addresses = fleet.scheduler_addresses
    async with AsyncExitStack() as stack:
        every = await stack.enter_async_context(open_client(ClientConfig(tls, schedulers=tuple(addresses.values()))))
        clients = {
            name: await stack.enter_async_context(open_client(ClientConfig(tls, scheduler=address)))
            for name, address in addresses.items()
        }
        watch = StoreWatch(fleet.endpoints, fleet.tls(Role.SCHEDULER, next(iter(fleet.schedulers))))
        stack.push_async_callback(watch.close)
        following = asyncio.create_task(watch.run())
        try:
            yield Scene(fleet, watch, Load(every), clients, chance)
        finally:
            following.cancel()
            await asyncio.wait({following})


@contextmanager
def running_rack(plan: RackPlan, tell: Callable[[str], None]) -> Iterator[RackFleet]:
    """A fleet that is well, in a folder of its own; it ends with the context."""
    # Not below /tmp: QEMU's unprivileged user passes through, and /tmp may be private to somebody.
    with tempfile.TemporaryDirectory(prefix="bedplate-rack-", dir="/var/tmp") as name:
        Path(name).chmod(0o711)
        folder = Path(name) / "rack"
        folder.mkdir()
        fleet = RackFleet(folder, plan)
        try:
            fleet.start(tell)
            yield fleet
        finally:
            fleet.stop()
