"""What clients ask of the fleet meanwhile, and what they were promised: every request is repeated until it is acknowledged."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from fleet.errors import BedplateError, InvalidSpecError, NotFoundError, NotPermittedError
from fleet.model.assignment import Sandbox
from fleet.model.ids import SandboxId, make_sandbox_id
from fleet.model.sandbox import Agent, Goal, Label, Network, NetworkMode, Resources, Restart, SandboxSpec
from mb.client import Client
from mb.live import OutputRange

# A request that is acknowledged by nobody for so long was lost.
ACKNOWLEDGE_TIMEOUT_S = 120.0
RETRY_S = 0.2
# A failover that takes longer than these is told by its measure; the hosts must not be full by then.
ASKED_MAX = 40
TOKEN = b"start "
T = TypeVar("T")


class Kind(StrEnum):
    """Which hosts carry a sandbox: those whose guests are real, or those where they are simulated."""

    REAL = "real"
    SIMULATED = "simulated"


@dataclass(slots=True)
class Promise:
    """A sandbox that was acknowledged, and what was asked for it last."""

    sandbox_id: SandboxId
    kind: Kind
    goal: Goal
    restarts: bool
    is_acknowledged: bool = False
    # The most that was seen of it: each placement may start it once.
    placements: int = 1


class Load:
    """One tenant's clients."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.promises: dict[SandboxId, Promise] = {}
        # Hosts that were away for longer than the fleet waits.
        self.lost_hosts: set[str] = set()
        self.tokens_seen: set[bytes] = set()
        self.retries = 0
        self.slowest_s = 0.0

    async def create(self, kind: Kind, client: Client | None = None) -> SandboxId:
        """A sandbox that prints its start's token and runs on, once it is acknowledged."""
        sandbox_id = make_sandbox_id(secrets.token_bytes)
        # Every other one is placed anew when its host is lost, and the rest end with it.
        restarts = len(self.promises) % 2 == 0
        promise = self.promises[sandbox_id] = Promise(sandbox_id, kind, Goal.RUN, restarts)
        spec = _spec(sandbox_id, kind, restarts=restarts)
        await self._until_acknowledged(lambda: (client or self._client).create_sandbox(sandbox_id, spec))
        promise.is_acknowledged = True
        return sandbox_id

    async def stop(self, sandbox_id: SandboxId) -> None:
        """Its VM shall end."""
        self.promises[sandbox_id].goal = Goal.STOP
        await self._until_acknowledged(lambda: self._client.stop_sandbox(sandbox_id))

    async def destroy(self, sandbox_id: SandboxId) -> None:
        """It shall go."""
        self.promises[sandbox_id].goal = Goal.REMOVE
        try:
            await self._until_acknowledged(lambda: self._client.destroy_sandbox(sandbox_id))
        except NotFoundError:
            # An earlier try was done and not answered.
            return

    async def ask_meanwhile(
        self, asked: set[SandboxId], clients: Callable[[], Client], pause_s: float, enough: asyncio.Event
    ) -> None:
        """Creates simulated sandboxes one after the other, into `asked` as they are acknowledged, until `enough` or ASKED_MAX."""
        for _ in range(ASKED_MAX):
            if enough.is_set():
                return
            asked.add(await self.create(Kind.SIMULATED, clients()))
            await asyncio.sleep(pause_s)

    async def list_all(self) -> dict[SandboxId, Sandbox]:
        """Every sandbox that the fleet tells of."""
        found = await self._until_acknowledged(self._client.list_sandboxes)
        for one in found:
            if (promise := self.promises.get(one.sandbox_id)) is not None:
                promise.placements = max(promise.placements, one.placement)
        return {one.sandbox_id: one for one in found}

    async def tokens(self, sandbox_id: SandboxId) -> list[bytes]:
        """What each start of its agent has printed."""

        async def read() -> bytes:
            chunks = self._client.live.read_output(sandbox_id, "worker", OutputRange(), follow=False)
            return b"".join([chunk.payload async for chunk in chunks])

        return [line for line in (await self._until_acknowledged(read)).splitlines() if line.startswith(TOKEN)]

    async def _until_acknowledged(self, ask: Callable[[], Awaitable[T]]) -> T:
        began_s = time.monotonic()
        async with asyncio.timeout(ACKNOWLEDGE_TIMEOUT_S):
            while True:
                try:
                    answer = await ask()
                except (InvalidSpecError, NotPermittedError, NotFoundError):
                    raise
                except BedplateError:
                    self.retries += 1
                    await asyncio.sleep(RETRY_S)
                else:
                    self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
                    return answer


def _spec(sandbox_id: SandboxId, kind: Kind, *, restarts: bool) -> SandboxSpec:
    if kind is Kind.REAL:
        # 256 MiB is the least that guests with systemd are given.
        resources = Resources(vcpus=1, memory_mib=256, disk_mib=64)
        script = "echo start $(cat /proc/sys/kernel/random/uuid); exec sleep 100000"
        command: tuple[str, ...] = ("sh", "-c", script)
    else:
        resources, command = Resources(vcpus=1, memory_mib=256, disk_mib=64), ("sleep", "100000")
    restart = Restart.ALWAYS if restarts else Restart.NO
    agent = Agent("worker", "custom", command, workdir="/tmp", memory_mib=128, grace_period_s=1.0, restart=restart)
    return SandboxSpec(
        name=f"{kind}-{sandbox_id}",
        resources=resources,
        network=Network(NetworkMode.CLOSED),
        agents=(agent,),
        require_labels=(Label("kind", kind),),
    )
