"""Durable placements: accepted over gRPC under mutual TLS, committed in a real etcd, acknowledged by hosts that are simulated.

An orchestrator sends `CreateSandboxes` at a steady pace; a sandbox counts once its answer is here, which says that record,
assignment and reservation are in etcd. `answer` is from the moment at which its call was due to its answer, `host` from there to
its host's status in etcd. Then a burst: all calls at once. Each number of hosts has an etcd and a scheduler of its own.
benchmarks/plane.py says exactly what is simulated; all of it shares this machine's cores.
"""

import argparse
import asyncio
import gc
import json
import secrets
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from benchmarks.measure import cpu_s, describe_machine, keep_result, render, resident_mib
from benchmarks.plane import IMAGE, ON_DISK, Plane, known_alive, profiled, running_plane, simulated_hosts
from fleet.codec import to_message
from fleet.identity import SCHEDULER_SERVER_NAME, Role
from fleet.model.sandbox import Agent, ImageRef, Resources, SandboxSpec
from fleet.rpc import open_channel
from provisioning.embedded.pki import EMBEDDED_TENANT, tls_files

GOAL_PER_S, GOAL_P99_S = 2000.0, 0.05
ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
# The sizes that orchestrators ask for, in turn.
SHAPES = (Resources(1, 512, 1024), Resources(2, 2048, 4096), Resources(1, 1024, 2048), Resources(4, 4096, 8192))
CALL_TIMEOUT_S = 60.0
# After the last answer the hosts have so long to publish theirs.
SETTLE_S = 2.0
BURST_CALLS_AT_ONCE = 16


@dataclass
class Samples:
    """When each sandbox was due and answered; what was refused, by code."""

    due_s: dict[str, float] = field(default_factory=dict)
    answered_s: dict[str, float] = field(default_factory=dict)
    placed: int = 0
    refused: dict[str, int] = field(default_factory=dict)


class Orchestrator:
    """Sends creations of sandboxes in calls of `batch`."""

    def __init__(self, channel: Any, batch: int) -> None:
        self._stub: Any = service_pb2_grpc.SandboxServiceStub(channel)
        self._batch = batch
        self._count = 0

    def request(self) -> Any:
        """The next call's request."""
        creations = []
        for _ in range(self._batch):
            self._count += 1
            creations.append(service_pb2.Creation(sandbox_id=_new_id(), spec=_spec(self._count)))
        return service_pb2.CreateSandboxesRequest(creations=creations)

    async def send(self, request: Any, due_s: float, samples: Samples) -> None:
        """One call, due at `due_s`."""
        samples.due_s.update((one.sandbox_id, due_s) for one in request.creations)
        answer = await self._stub.CreateSandboxes(request, timeout=CALL_TIMEOUT_S)
        now_s = time.monotonic()
        for result in answer.results:
            if result.HasField("error"):
                samples.refused[result.error.code] = samples.refused.get(result.error.code, 0) + 1
            else:
                samples.answered_s[result.sandbox.sandbox_id] = now_s
                samples.placed += bool(result.sandbox.host_id)

    async def pace(self, rate: float, duration_s: float) -> Samples:
        """`rate` sandboxes a second for so long, whether answers come or not."""
        samples, calls = Samples(), round(rate * duration_s / self._batch)
        requests = [self.request() for _ in range(calls)]
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(requests):
                due_s = started + number * self._batch / rate
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                group.create_task(self.send(request, due_s, samples))
        return samples

    async def burst(self, count: int) -> Samples:
        """`count` sandboxes as fast as BURST_CALLS_AT_ONCE callers get their answers; all are due at once."""
        samples = Samples()
        requests = [self.request() for _ in range(count // self._batch)]
        started = time.monotonic()
        gate = asyncio.Semaphore(BURST_CALLS_AT_ONCE)

        async def one(request: Any) -> None:
            async with gate:
                await self.send(request, started, samples)

        await asyncio.gather(*map(one, requests))
        return samples


def main() -> int:
    """Measures and prints; 0 when every sandbox was placed and acknowledged."""
    parser = argparse.ArgumentParser("benchmarks.durable", description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1000, 5000], help="hosts, one run each (%(default)s)")
    parser.add_argument("--rate", type=float, default=GOAL_PER_S, help="sandboxes a second (%(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long to keep that pace (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sandboxes in a call (%(default)s)")
    parser.add_argument("--burst", type=int, default=10_000, help="sandboxes in the burst (%(default)s)")
    parser.add_argument("--below", default=ON_DISK, metavar="FOLDER", help="where etcd's data lies (%(default)s)")
    parser.add_argument("--profile", metavar="FILE", help="profile the scheduler with cProfile into FILE")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="also keep the result in benchmarks/results")
    options = parser.parse_args()
    # The clock's owner must not stand still: collecting what it has noted takes 0.1 s.
    gc.disable()
    found: dict[str, Any] = {"machine": describe_machine(), "goal": {"per_s": GOAL_PER_S, "p99_s": GOAL_P99_S}}
    found["run"] = {"per_s": options.rate, "batch": options.batch, "etcd below": options.below}
    for hosts in options.hosts:
        found[f"{hosts} hosts"] = _measure(hosts, options)
    if options.save:
        keep_result("durable", found)
    print(json.dumps(found, indent=2) if options.json else render(found))
    runs = [run for rows in found.values() for run in rows.values() if isinstance(run, dict) and "sandboxes" in run]
    return 0 if all(run["sandboxes"] == run["placed"] == run["acknowledged"] for run in runs) else 1


def _measure(hosts: int, options: argparse.Namespace) -> dict[str, Any]:
    with running_plane(profiled(options.profile), below=options.below) as plane:
        with simulated_hosts(plane, hosts) as said:
            runs = asyncio.run(_run(plane, hosts, options))
        acknowledged = json.loads(said.read_text())
        return {name: _figures(samples, acknowledged) | spent for name, (samples, spent) in runs.items()}


async def _run(plane: Plane, hosts: int, options: argparse.Namespace) -> dict[str, tuple[Samples, dict[str, Any]]]:
    await known_alive(plane, hosts, CALL_TIMEOUT_S)
    tls = tls_files(plane.pki, Role.TENANT, EMBEDDED_TENANT)
    async with open_channel(plane.address, tls, SCHEDULER_SERVER_NAME) as channel:
        orchestrator = Orchestrator(channel, options.batch)
        await orchestrator.burst(20 * options.batch)
        runs = {}
        for name in ("steady", "burst"):
            await asyncio.sleep(SETTLE_S)
            before, started = {key: cpu_s(pid) for key, pid in plane.pids().items()}, time.monotonic()
            is_burst = name == "burst"
            pace = orchestrator.burst(options.burst) if is_burst else orchestrator.pace(options.rate, options.seconds)
            samples = await pace
            took_s = time.monotonic() - started
            spent = {f"{key}_cores": round((cpu_s(pid) - before[key]) / took_s, 2) for key, pid in plane.pids().items()}
            spent["scheduler_mib"] = resident_mib(plane.pids()["scheduler"])
            runs[name] = (samples, spent)
        await asyncio.sleep(SETTLE_S)
        return runs


def _figures(samples: Samples, acknowledged: dict[str, float]) -> dict[str, Any]:
    answers = sorted(samples.answered_s[one] - samples.due_s[one] for one in samples.answered_s)
    hosts = sorted(acknowledged[one] - samples.due_s[one] for one in samples.answered_s if one in acknowledged)
    took_s = max(samples.answered_s.values()) - min(samples.due_s.values())
    return {
        "sandboxes": len(samples.due_s),
        "placed": samples.placed,
        "acknowledged": len(hosts),
        "refused": samples.refused,
        "per_s": round(len(answers) / took_s, 1),
        "answer_p50_s": _percentile(answers, 0.5),
        "answer_p99_s": _percentile(answers, 0.99),
        "host_p50_s": _percentile(hosts, 0.5),
        "host_p99_s": _percentile(hosts, 0.99),
    }


def _percentile(ordered: list[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) if ordered else -1.0


def _spec(number: int) -> Any:
    agent = Agent("worker", "custom", ("sleep", "3600"), memory_mib=256)
    resources = SHAPES[number % len(SHAPES)]
    return to_message(SandboxSpec(f"box-{number}", ImageRef(IMAGE), resources, agents=(agent,)))


def _new_id() -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(12))


if __name__ == "__main__":
    sys.exit(main())
