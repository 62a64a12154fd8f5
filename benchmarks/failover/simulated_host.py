"""hostd whose VMs are simulated, with a line in its folder for each start and end of one: `python -m … --config FILE`."""

import argparse
import asyncio
import json
import time
from pathlib import Path

from benchmarks.simulated import serve_simulated
from fleet.config import load_config
from fleet.model.ids import SandboxId
from fleet.telemetry import configure_logging
from hostd.config import HostdConfig
from hostd.drivers.simulated import SimulatedHypervisor
from hostd.reconcile.state import DomainState, Machine

LIVES = "lives.jsonl"


class ToldHypervisor(SimulatedHypervisor):
    """Domains whose lives are written to `path`, in seconds of the machine's monotonic clock."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._stream = path.open("a", buffering=1)
        self._living: set[SandboxId] = set()

    async def ensure_domain(self, machine: Machine) -> None:
        """Starts it, and tells it before anyone can see it run."""
        if machine.sandbox_id not in self.domains:
            self._living.add(machine.sandbox_id)
            self._write("started", machine.sandbox_id)
        await super().ensure_domain(machine)

    async def remove_domain(self, sandbox_id: SandboxId) -> None:
        """Ends it, and tells it afterwards."""
        await super().remove_domain(sandbox_id)
        self._end(sandbox_id)

    def set_state(self, sandbox_id: SandboxId, state: DomainState) -> None:
        """The guest powers off, or is paused."""
        super().set_state(sandbox_id, state)
        if state is DomainState.DEAD:
            self._end(sandbox_id)

    def _end(self, sandbox_id: SandboxId) -> None:
        if sandbox_id in self._living:
            self._living.discard(sandbox_id)
            self._write("ended", sandbox_id)

    def _write(self, event: str, sandbox_id: SandboxId) -> None:
        self._stream.write(json.dumps({"at_s": time.monotonic(), "event": event, "sandbox_id": sandbox_id}) + "\n")


def main() -> None:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser("benchmarks.failover.simulated_host", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    config = load_config(HostdConfig, parser.parse_args().config)
    configure_logging("hostd", config.log_level)
    config.state_dir.mkdir(exist_ok=True)
    asyncio.run(serve_simulated(config, ToldHypervisor(config.state_dir / LIVES)))


if __name__ == "__main__":
    main()
