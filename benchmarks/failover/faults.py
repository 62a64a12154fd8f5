"""What befalls the fleet in a round, drawn from a seed, and how it is mended. Each fault tells what it did and how long it took."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.failover.load import Kind, Load
from benchmarks.failover.quota import fill_and_heal
from benchmarks.failover.watch import Failover, StoreWatch
from mb.client import Client
from provisioning.embedded.rackfleet import RackFleet, Unit

# Two requests' distance while a failover is measured: often enough that the first placement waits for the fleet only.
ASK_S = 0.1
# How long a cut lasts: past the leader's lease and etcd's election, and short of a host's lease.
CUT_S = (3.0, 9.0)
# How long a paused leader sleeps on after another was elected.
ZOMBIE_S = (0.2, 3.0)
DOWN_S = (0.5, 4.0)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a fault has to do with."""

    fleet: RackFleet
    watch: StoreWatch
    load: Load
    clients: Mapping[str, Client]
    chance: random.Random
    # Requests under way: some are answered only when the fault is mended.
    unanswered: list[asyncio.Task[None]] = field(default_factory=list)

    def client_beside(self, name: str) -> Client:
        """A client of some scheduler that is not `name`."""
        return self.clients[self.chance.choice([one for one in self.clients if one != name])]

    async def sleep(self, span_s: tuple[float, float]) -> None:
        """A while."""
        await asyncio.sleep(self.chance.uniform(*span_s))


@dataclass(frozen=True, slots=True)
class Report:
    """What was done, in words, and the failover that was measured, if one was."""

    what: str
    failover: Failover | None = None


Fault = Callable[[Scene], Awaitable[Report]]


async def kill_leader(scene: Scene) -> Report:
    """kill -9 of the scheduler that leads."""
    unit = await _leader(scene)
    failover = await _measured(scene, unit.name, unit.kill)
    await scene.sleep(DOWN_S)
    unit.start()
    return Report(f"kill -9 of {unit.name}, which led", failover)


async def pause_leader(scene: Scene) -> Report:
    """SIGSTOP of the scheduler that leads, until after another does; then it goes on as if nothing had been."""
    unit = await _leader(scene)
    failover = await _measured(scene, unit.name, unit.pause)
    await scene.sleep(ZOMBIE_S)
    unit.resume()
    return Report(f"SIGSTOP of {unit.name}, which led, past its lease", failover)


async def end_leader(scene: Scene) -> Report:
    """SIGTERM: it resigns."""
    unit = await _leader(scene)
    failover = await _measured(scene, unit.name, unit.program.process.terminate)
    await asyncio.to_thread(unit.stop)
    unit.start()
    return Report(f"SIGTERM of {unit.name}, which led", failover)


async def isolate_leader(scene: Scene) -> Report:
    """The scheduler that leads is cut off from every member of etcd: from both sides, or from one."""
    unit = await _leader(scene)
    ways = scene.chance.choice(["to", "from", "both"])

    def cut() -> None:
        for etcd in scene.fleet.etcds:
            if ways != "from":
                scene.fleet.rack.cut(unit.name, etcd)
            if ways != "to":
                scene.fleet.rack.cut(etcd, unit.name)

    failover = await _measured(scene, unit.name, cut)
    await scene.sleep(ZOMBIE_S)
    await asyncio.to_thread(scene.fleet.rack.heal)
    return Report(f"{unit.name}, which led, cut off from etcd ({ways})", failover)


async def kill_etcd_leader(scene: Scene) -> Report:
    """kill -9 of the member that leads etcd."""
    unit = await _etcd_leader(scene)
    failover = await _measured(scene, "", unit.kill)
    await scene.sleep(DOWN_S)
    unit.start()
    return Report(f"kill -9 of {unit.name}, which led etcd", failover)


async def pause_etcd_leader(scene: Scene) -> Report:
    """SIGSTOP of the member that leads etcd: its connections stay, and nobody answers on them."""
    unit = await _etcd_leader(scene)
    failover = await _measured(scene, "", unit.pause)
    await scene.sleep(DOWN_S)
    unit.resume()
    return Report(f"SIGSTOP of {unit.name}, which led etcd", failover)


async def cut_any_two(scene: Scene) -> Report:
    """The network between any two machines swallows what is sent, one way or both."""
    first, second = scene.chance.sample([unit.name for unit in scene.fleet.units()], 2)
    is_mutual = scene.chance.random() < 0.5

    def cut() -> None:
        scene.fleet.rack.cut(first, second)
        if is_mutual:
            scene.fleet.rack.cut(second, first)

    failover = await _measured(scene, "", cut)
    await scene.sleep(CUT_S)
    await asyncio.to_thread(scene.fleet.rack.heal)
    return Report(f"{first} {'and' if is_mutual else 'to'} {second} cut", failover)


async def cut_host(scene: Scene) -> Report:
    """A host is cut off from every member of etcd, for less than its lease."""
    host = scene.chance.choice(list(scene.fleet.hosts))

    def cut() -> None:
        for etcd in scene.fleet.etcds:
            scene.fleet.rack.cut(host, etcd)
            scene.fleet.rack.cut(etcd, host)

    failover = await _measured(scene, "", cut)
    await scene.sleep(CUT_S)
    await asyncio.to_thread(scene.fleet.rack.heal)
    return Report(f"{host} cut off from etcd", failover)


async def kill_hostd(scene: Scene) -> Report:
    """kill -9 of hostd on a host with real VMs, which go on."""
    name = scene.chance.choice(list(scene.fleet.libvirts))
    unit = scene.fleet.hosts[name]
    unit.kill()
    await scene.sleep(DOWN_S)
    unit.start()
    return Report(f"kill -9 of hostd on {name}")


async def lose_host(scene: Scene) -> Report:
    """A host is away for longer than the fleet waits: cut off from etcd, or, where its VMs are real, with its hostd dead."""
    await scene.load.create(Kind.SIMULATED)
    carrying = {str(one.host_id) for one in (await scene.load.list_all()).values() if one.host_id}
    name = scene.chance.choice(sorted(carrying or scene.fleet.hosts))
    is_dead = name in scene.fleet.libvirts and scene.chance.random() < 0.5
    scene.load.lost_hosts.add(name)
    began_s = time.monotonic()
    carried = {one for one, found in (await scene.load.list_all()).items() if found.host_id == name}
    if is_dead:
        scene.fleet.hosts[name].kill()
    else:
        for etcd in scene.fleet.etcds:
            await asyncio.to_thread(scene.fleet.rack.cut, name, etcd)
            await asyncio.to_thread(scene.fleet.rack.cut, etcd, name)
    await scene.watch.until_left(name, carried)
    lost_s = time.monotonic() - began_s
    await scene.sleep(DOWN_S)
    how = "its hostd killed" if is_dead else "cut off from etcd"
    return Report(f"{name} lost, {how}: all {len(carried)} sandboxes had left it after {lost_s:.1f} s")


async def fill_quota(scene: Scene) -> Report:
    """etcd's quota is full: writes are refused until an operator has compacted, defragmented and disarmed."""
    refused_s = await fill_and_heal(scene.fleet, scene.watch)
    return Report(f"etcd's quota filled, writes refused for {refused_s:.1f} s, then healed")


FAULTS: dict[str, Fault] = {
    one.__name__: one
    for one in (
        kill_leader,
        pause_leader,
        end_leader,
        isolate_leader,
        kill_etcd_leader,
        pause_etcd_leader,
        cut_any_two,
        cut_host,
        kill_hostd,
        lose_host,
        fill_quota,
    )
}


async def _leader(scene: Scene) -> Unit:
    return scene.fleet.schedulers[await scene.watch.until_led()]


async def _etcd_leader(scene: Scene) -> Unit:
    endpoint = await scene.watch.etcd_leader()
    return next(scene.fleet.etcds[one.name] for one in scene.fleet.members if one.client == endpoint)


async def _measured(scene: Scene, hurt: str, inflict: Callable[[], Any]) -> Failover:
    """From the moment of the fault until a sandbox is placed that was asked for afterwards, of schedulers other than `hurt`."""
    fault_s = time.monotonic()
    await asyncio.to_thread(inflict)
    asked: set[Any] = set()
    enough = asyncio.Event()
    asking = scene.load.ask_meanwhile(asked, lambda: scene.client_beside(hurt), ASK_S, enough)
    scene.unanswered.append(asyncio.create_task(asking))
    try:
        return await scene.watch.measure(fault_s, asked)
    finally:
        enough.set()
