"""What the fleet's clients do: create, many at once, as groups, twice, and late once more; stop, start, destroy, cordon, drain."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from bedplate.host.v1 import service_pb2 as host_pb2
from bedplate.sandbox.v1 import service_pb2
from fleet.codec import to_message
from fleet.errors import BedplateError, ConflictError, InvalidSpecError, NotFoundError
from fleet.identity import TlsFiles
from fleet.model.ids import SandboxId, make_sandbox_id
from fleet.model.sandbox import Agent, Limits, Network, NetworkMode, Placement, Resources, Restart, SandboxSpec, Totals
from simulation.checker import Checker
from simulation.loop import Life, Process, VirtualLoop
from simulation.machines import HostProgram, SchedulerProgram

RPC_TIMEOUT_S = 6.0
EXPECTED = (ConflictError, NotFoundError, InvalidSpecError)
# So many creations come at one moment, now and then.
BURST = 4
GROUP_SIZE_MAX = 3
# Some sandboxes may run for so long only.
WALL_MS = 25_000


class Caller:
    """The context of a call of the fleet's tenant or operator."""

    def __init__(self, certificate: bytes) -> None:
        self._certificate = certificate

    def auth_context(self) -> dict[str, tuple[bytes, ...]]:
        """What TLS has verified."""
        return {"x509_pem_cert": (self._certificate,)}

    def invocation_metadata(self) -> tuple[()]:
        """None."""
        return ()


@dataclass(frozen=True, slots=True)
class Papers:
    """Certificates, made once for all seeds: nothing in a history depends on them."""

    host: TlsFiles
    tenant: bytes
    operator: bytes


@dataclass(frozen=True, slots=True)
class Fleet:
    """Whom clients can reach, and what they are watched by."""

    loop: VirtualLoop
    schedulers: Sequence[SchedulerProgram]
    hosts: Sequence[HostProgram]
    checker: Checker
    tell: Callable[[str], None]


class Clients:
    """All clients of one fleet; they follow `chance`, and rest once `is_calm`."""

    def __init__(self, fleet: Fleet, papers: Papers, chance: Random, sandboxes: int) -> None:
        self._fleet = fleet
        self._papers = papers
        self._chance = chance
        self._sandboxes = sandboxes
        self._process = Process("client")
        self._requests: list[Any] = []
        self.is_calm = False

    def begin(self) -> None:
        """They begin."""
        self._fleet.loop.spawn(self._process, self._wish())

    def destroy_all(self) -> None:
        """Everything that is there shall go."""
        self._fleet.loop.spawn(self._process, self._destroy_all())

    async def _wish(self) -> None:
        chance, made = self._chance, 0
        while not self.is_calm:
            await asyncio.sleep(chance.expovariate(0.4))
            what = chance.randrange(20)
            known = sorted(id_ for id_, fact in self._fleet.checker.facts.items() if fact.is_acknowledged)
            if made < self._sandboxes and what < 9:
                count = BURST if what < 2 else 1
                placement = Placement(chance.choice((0, 0, 0, 5)))
                if what == 2:
                    count = chance.randint(2, GROUP_SIZE_MAX)
                    placement = Placement(group=f"group-{made}", group_size=count)
                for _ in range(count):
                    made += 1
                    self._spawn(self._create(chance, made, placement))
            elif known and what < 15:
                self._spawn(self._change(chance, chance.choice(known)))
            elif what < 17:
                self._spawn(self._cordon(chance))
            elif self._requests and what < 18:
                self._spawn(self._repeat(chance, chance.choice(self._requests)))
            elif known:
                chance.choice(self._fleet.hosts).end_agents(chance.choice(known), chance.choice((0, 3)))

    def _spawn(self, body: Any) -> None:
        self._fleet.loop.spawn(self._process, body)

    async def _create(self, chance: Random, number: int, placement: Placement) -> None:
        request = self._draw_request(chance, number, placement)
        self._requests.append(request)
        if chance.randrange(4) == 0 and not placement.group:
            # Another client wants the same name at the same time: one of them gets it.
            self._spawn(self._submit(chance, self._draw_request(chance, number, placement)))
        await self._submit(chance, request)

    async def _submit(self, chance: Random, request: Any) -> None:
        if await self._call(chance, lambda one, caller: one.CreateSandbox(request, caller)):
            self._fleet.checker.acknowledged(SandboxId(request.sandbox_id))
            self._fleet.tell(f"client knows of {request.sandbox_id}")

    async def _repeat(self, chance: Random, request: Any) -> None:
        """A creation comes once more, late, whatever has become of its sandbox."""
        self._fleet.tell(f"client repeats the creation of {request.sandbox_id}")
        await self._call(chance, lambda one, caller: one.CreateSandbox(request, caller), tries=1)

    def _draw_request(self, chance: Random, number: int, placement: Placement) -> Any:
        sandbox_id = make_sandbox_id(chance.randbytes)
        ending = chance.choice(("runs", "runs", "ends", "fails"))
        restart = chance.choice((Restart.NO, Restart.ON_FAILURE, Restart.ALWAYS))
        agent = Agent("worker", "custom", ("work", sandbox_id, ending), restart=restart, memory_mib=64)
        resources = Resources(chance.choice((1, 1, 2, 4)), chance.choice((256, 512, 1024)), 64)
        limits = Limits(total=Totals(wall_ms=WALL_MS if chance.randrange(6) == 0 else 0))
        network = Network(NetworkMode.CLOSED)
        spec = SandboxSpec(
            f"box-{number}", resources=resources, network=network, agents=(agent,), placement=placement, limits=limits
        )
        return service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id, spec=to_message(spec))

    async def _change(self, chance: Random, sandbox_id: SandboxId) -> None:
        verb = chance.choice(("StopSandbox", "StopSandbox", "StartSandbox", "DestroySandbox"))
        if verb == "DestroySandbox":
            self._fleet.checker.facts[sandbox_id].is_destroy_asked = True
        request = service_pb2.GetSandboxRequest(sandbox=sandbox_id)
        self._fleet.tell(f"client {verb} {sandbox_id}")
        await self._call(chance, lambda one, caller: getattr(one, verb)(request, caller))

    async def _cordon(self, chance: Random) -> None:
        host, verb = chance.choice(self._fleet.hosts), chance.choice(("cordons", "uncordons", "uncordons", "drains"))
        is_forced = chance.randrange(2) == 0
        self._fleet.tell(f"client {verb} {host.name}")

        async def call() -> bool:
            served = [one.hosts for one in self._fleet.schedulers if one.is_alive and one.hosts is not None]
            if not served:
                return False
            caller = Caller(self._papers.operator)
            if verb == "drains":
                drain = host_pb2.DrainHostRequest(host_id=host.name, moves_max=2, is_forced=is_forced)
                await served[0].DrainHost(drain, caller)
            elif verb == "cordons":
                await served[0].CordonHost(host_pb2.CordonHostRequest(host_id=host.name), caller)
            else:
                await served[0].UncordonHost(host_pb2.UncordonHostRequest(host_id=host.name), caller)
            return True

        try:
            await call()
        except BedplateError:
            return

    async def _call(self, chance: Random, call: Callable[[Any, Any], Awaitable[Any]], *, tries: int = 30) -> bool:
        """Calls one scheduler after another until one has answered; whether it was done. Some calls come twice."""
        caller = Caller(self._papers.tenant)
        for _ in range(tries):
            served = [
                one for one in self._fleet.schedulers if one.process.life is not Life.DEAD and one.sandboxes is not None
            ]
            if not served:
                await asyncio.sleep(2)
                continue
            program = chance.choice(served)
            service = program.sandboxes
            answers = [
                self._fleet.loop.spawn(program.process, _answer(call(service, caller)))
                for _ in range(1 + (chance.randrange(8) == 0))
            ]
            await asyncio.wait(answers, timeout=RPC_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            done = [one.result() for one in answers if one.done()]
            if any(one is None for one in done):
                return True
            if any(isinstance(one, EXPECTED) for one in done):
                return False
            await asyncio.sleep(1 + chance.random())
        return False

    async def _destroy_all(self) -> None:
        chance = self._chance
        for sandbox_id in sorted(self._fleet.checker.records):
            self._fleet.checker.facts[sandbox_id].is_destroy_asked = True
            await self._destroy(chance, service_pb2.GetSandboxRequest(sandbox=sandbox_id))

    async def _destroy(self, chance: Random, request: Any) -> None:
        await self._call(chance, lambda one, caller: one.DestroySandbox(request, caller))


async def _answer(call: Awaitable[Any]) -> BedplateError | None:
    try:
        await call
    except BedplateError as error:
        return error
    return None
