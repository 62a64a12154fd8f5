"""What a sandbox costs on this machine: cold start by stage, memory, what hostd takes with 0, 10 and 50 idle VMs, the latency of a
program run in a guest, and how fast output and artifacts flow.

Real VMs through `mb` and the API; the 50 are simulated (benchmarks/simulated.py), because their memory would not fit.
Medians and 99th percentiles over the runs of one session. `--save` keeps them in benchmarks/results with the machine's name.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from benchmarks.figures import start_once, summarise_stages
from benchmarks.measure import (
    describe_machine,
    keep_result,
    render,
    run_mb,
    running_fleet,
    summary,
    timed,
    wait_phase,
    watch_idle,
    write_project,
)
from benchmarks.simulated import measure_simulated
from fleet.identity import SCHEDULER_SERVER_NAME, Role
from fleet.model.units import MIB
from fleet.rpc import open_channel
from provisioning.embedded.fleet import EmbeddedFleet
from provisioning.embedded.pki import EMBEDDED_TENANT, tls_files

# Small enough that ten fit a laptop, large enough that a guest is itself.
IDLE_MEMORY = "256MiB"
# Below an agent's limit of 64 MiB, so that all of it is kept.
OUTPUT_MIB = 32
ARTIFACT_MIB = 64
EXEC_TIMEOUT_S = 60.0
# Each look of `mb top` takes a second; a heartbeat comes every five.
LOOKS_MAX = 30
# A guest readies itself for the next program (docs/decisions/0027); whoever leaves it no time for that waits for it.
EXEC_PAUSE_S = 0.2


def main() -> int:
    """Measures and prints; 0 when every run succeeded."""
    parser = argparse.ArgumentParser("benchmarks.boot", description=__doc__)
    parser.add_argument("--starts", type=int, default=10, help="cold starts (%(default)s)")
    parser.add_argument("--execs", type=int, default=60, help="programs run in one guest (%(default)s)")
    parser.add_argument("--listings", type=int, default=20, help="runs of mb ls (%(default)s)")
    parser.add_argument("--vms", type=int, default=10, help="idle VMs at once (%(default)s)")
    parser.add_argument("--simulated", type=int, default=50, help="simulated idle VMs at once (%(default)s)")
    parser.add_argument("--idle-s", type=float, default=60.0, help="how long to watch idle programs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="also keep the result in benchmarks/results")
    options = parser.parse_args()
    with running_fleet(vcpus=options.vms + 2, memory_mib=(options.vms + 1) * 1024) as (fleet, folder):
        found = {"machine": describe_machine(), **_measure(fleet, folder, options)}
        found |= measure_simulated(fleet, folder, options.simulated, options.idle_s)
    if options.save:
        keep_result("boot", found)
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0


def _measure(fleet: EmbeddedFleet, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    programs = {"hostd": fleet.hostd.pid, "scheduler": fleet.scheduler.pid}
    found: dict[str, Any] = {"idle, no VM": watch_idle(programs, options.idle_s)}
    quick = write_project(folder, "quick", ["echo", "hello"])
    runs = [start_once(fleet, quick) for _ in range(options.starts)]
    found["cold start, seconds since the request"] = summarise_stages(runs)
    idle = write_project(folder, "idle", ["sleep", "3600"], memory=IDLE_MEMORY)
    run_mb(fleet, "up", str(idle), "--detach")
    wait_phase(fleet, "idle", "running")
    found["one guest, MiB"] = _read_memory(fleet)
    found["exec of true, seconds"] = {
        "now and then": asyncio.run(_measure_exec(fleet, "idle", options.execs, EXEC_PAUSE_S)),
        "without a pause": asyncio.run(_measure_exec(fleet, "idle", options.execs, 0.0)),
    }
    found["mb exec of true, seconds"] = summary(
        [timed(lambda: run_mb(fleet, "exec", "idle", "--", "true")) for _ in range(options.listings)]
    )
    found["mb ls, seconds"] = summary([timed(lambda: run_mb(fleet, "ls")) for _ in range(options.listings)])
    found["throughput, MiB/s"] = _measure_throughput(fleet, folder)
    names = [f"idle-{number}" for number in range(options.vms - 1)]
    for name in names:
        run_mb(fleet, "up", str(idle), "--detach", "--name", name)
        wait_phase(fleet, name, "running")
    found[f"idle, {options.vms} VMs"] = watch_idle(programs, options.idle_s)
    for name in ["idle", *names]:
        run_mb(fleet, "destroy", name)
    return found


def _read_memory(fleet: EmbeddedFleet) -> dict[str, float]:
    # The guest's own figure comes with its first heartbeat; then systemd, too, has settled.
    for _ in range(LOOKS_MAX):
        (usage,) = json.loads(run_mb(fleet, "top", "--json"))["uses"]
        if usage["guest_memory_mib"]:
            break
    return {"VMM": usage["vmm_memory_mib"], "guest in use": usage["guest_memory_mib"]}


async def _measure_exec(fleet: EmbeddedFleet, name: str, runs: int, pause_s: float) -> dict[str, float]:
    """From the call to the exit code, over a connection that stands; each call `pause_s` after the end of the last."""
    tls = tls_files(fleet.folder / "pki", Role.TENANT, EMBEDDED_TENANT)
    async with open_channel(fleet.address, tls, SCHEDULER_SERVER_NAME) as channel:
        stub: Any = service_pb2_grpc.ExecServiceStub(channel)
        samples = []
        for _ in range(runs + 1):
            await asyncio.sleep(pause_s)
            started = time.monotonic()
            await _run_true(stub, name)
            samples.append(time.monotonic() - started)
    # The first opened the connection.
    return summary(samples[1:])


async def _run_true(stub: Any, name: str) -> None:
    async def requests() -> AsyncIterator[Any]:
        yield service_pb2.ExecRequest(open=service_pb2.ExecOpen(sandbox=name, command=["true"]))
        yield service_pb2.ExecRequest(input_end=True)

    async for response in stub.Exec(requests(), timeout=EXEC_TIMEOUT_S):
        if response.WhichOneof("part") == "ended" and response.ended.exit_code != 0:
            raise RuntimeError(f"true ended with {response.ended}")


def _measure_throughput(fleet: EmbeddedFleet, folder: Path) -> dict[str, float]:
    """Output from its first to its last byte on the host, and an artifact from the agents' end to its being stored."""
    script = f"head -c {OUTPUT_MIB}M /dev/zero; head -c {ARTIFACT_MIB}M /dev/urandom >/workspace/random"
    project = write_project(folder, "flow", ["sh", "-c", script], memory="512MiB", disk="512MiB")
    run_mb(fleet, "up", str(project), "--detach")
    started = time.monotonic()
    read = len(run_mb(fleet, "logs", "flow", "--follow"))
    logs_s = time.monotonic() - started
    sandbox = wait_phase(fleet, "flow", "completed")
    stages = {stage["name"]: stage["at_ms"] for stage in sandbox["status"]["stages"]}
    started = time.monotonic()
    run_mb(fleet, "get", "flow", str(folder / "flow-out"))
    get_s = time.monotonic() - started
    run_mb(fleet, "destroy", "flow")
    output_s = (stages["agents_ended"] - stages["first_output"]) / 1000
    artifact_s = (stages["artifact_stored"] - stages["agents_ended"]) / 1000
    return {
        "output to host": round(read / MIB / output_s, 2),
        "logs to mb, boot included": round(read / MIB / logs_s, 2),
        "artifact to host": round(ARTIFACT_MIB / artifact_s, 2),
        "artifact to mb": round(ARTIFACT_MIB / get_s, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
