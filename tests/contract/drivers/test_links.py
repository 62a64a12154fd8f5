"""A guest at the other end of every GuestLinks is understood by hostd's sessions: configure, output, artifact, stop, resume."""

import asyncio
import base64
import contextlib
import json
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.errors import ConflictError, HostFaultError, UnavailableError
from fleet.model.assignment import Assignment
from fleet.model.host import Accelerator
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Agent, AgentPhase, Goal, Phase, SandboxSpec, Source
from hostd.drivers.guest import Pace, SocketLinks
from hostd.drivers.guest.frames import MAGIC, MARKER_BYTES, FrameReader, encode_frame
from hostd.drivers.ports import LinkMessage
from hostd.drivers.simulated import PlannedFaults, SimulatedHypervisor, SimulatedLinks
from hostd.drivers.simulated_guest import AgentScript, Behaviour, SimulatedGuest, follow_command
from hostd.orders import Orders
from hostd.reconcile.execs import EXECS_MAX, Exec, ExecEnded, ExecOutput, ExecStarted, Program
from hostd.reconcile.progress import begin, render_status, stop
from hostd.reconcile.session import Sessions
from hostd.reconcile.state import BootFiles, DomainState, Machine

A = SandboxId("aaaaaaaaaaaa")
DIGEST = Digest("sha256:" + "0" * 64)
# Three times what a guest may send ahead of an ack, and no whole number of chunks.
MUCH = bytes(range(256)) * 12_289
# Only a test that fails waits as long.
PATIENCE_S = 10.0


def make_order(*commands: tuple[str, ...], goal: Goal = Goal.RUN) -> Assignment:
    agents = tuple(Agent(f"agent-{index}", "custom", command) for index, command in enumerate(commands))
    spec = SandboxSpec("box", agents=agents, sources=(Source(DIGEST, 1, "/workspace"),))
    return Assignment(A, Tenant("acme"), HostId("host-1"), spec, DIGEST, 64, goal, 1, 1, 1)


def make_machine() -> Machine:
    boot = BootFiles(DIGEST, "/k", "/i", "/r", "")
    return Machine(A, "acme", 1, 256, 64, Accelerator.SIMULATED, boot, "/s", "/l", "/c", "generation-1")


class SocketGuests:
    """The room's guest behind a real socket, as QEMU serves it: one client at a time, the marker first, bytes lost at a break."""

    def __init__(self, room: SimulatedHypervisor, path: str) -> None:
        self.path = path
        self._room = room
        self.behave: Behaviour = follow_command
        self.faults = PlannedFaults()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One session with hostd."""
        with contextlib.suppress(OSError, HostFaultError):
            await self._converse(reader, writer)
        writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        domain = self._room.domains[A]
        if domain.state is DomainState.DEAD:
            return
        domain.guest = domain.guest or SimulatedGuest(domain.machine.generation_id, self.behave)
        marker = await reader.readexactly(MARKER_BYTES)
        frames = FrameReader()
        frames.expect(marker[len(MAGIC) :])
        assert list(frames.feed(marker)) == []
        writer.write(marker + encode_frame(domain.guest.greet()))
        while content := await reader.read(64 * 1024):
            for message in frames.feed(content):
                if message.type == "poweroff":
                    self._room.set_state(A, DomainState.DEAD)
                    return
                self.faults.strike("link", A)
                # What a host sends beside JSON is text, so that nothing in it looks like a marker.
                payload = base64.b64decode(message.payload, validate=True)
                for answer in domain.guest.take(replace(message, payload=payload)):
                    writer.write(encode_frame(answer))
                await writer.drain()


class Hostd:
    """One run of hostd's conversation with its guests, over a machine room that outlives it."""

    def __init__(self, folder: Path, links: SimulatedLinks | SocketLinks, link_path: str) -> None:
        self.orders = Orders(folder)
        self.links = links
        self._link_path = link_path
        self._changed = asyncio.Event()
        self.sessions = Sessions(self.orders, self.links, self._changed.set, lambda: 1_000)

    def accept(self, order: Assignment) -> None:
        self.orders.put_order(order)
        if A not in self.orders.progress:
            self.orders.put_progress(begin(order, "", ""))
        if order.goal is Goal.STOP:
            self.orders.put_progress(stop(self.orders.progress[A], 1_000))
        self.sessions.attach(A, self._link_path)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                await self._changed.wait()
                self._changed.clear()

    def phase(self) -> Phase:
        order, progress = self.orders.orders[A], self.orders.progress[A]
        return render_status(order, progress, accelerator="simulated", is_released=False, now_ms=1).phase

    def output(self, agent: str) -> bytes:
        return self.orders.output_path(A, agent).read_bytes()

    def has_artifact(self) -> bool:
        return self.orders.progress[A].artifact is not None

    async def crash(self) -> None:
        await self.links.close()


async def send_on(hostd: Hostd) -> None:
    """Sends until a send is refused."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await hostd.links.send(A, LinkMessage("stop"))
            await asyncio.sleep(0)


MakeHostd = Callable[..., Hostd]


@pytest.fixture
async def room() -> SimulatedHypervisor:
    """A machine room with one running domain."""
    room = SimulatedHypervisor()
    await room.ensure_domain(make_machine())
    return room


@pytest.fixture(params=["simulated", "socket"])
async def make_hostd(
    request: pytest.FixtureRequest, room: SimulatedHypervisor, tmp_path: Path
) -> AsyncIterator[MakeHostd]:
    """Starts hostd on the same disk and the same machine room, as often as asked."""
    started: list[Hostd] = []
    # A socket's path may have 107 bytes, and pytest's own are long.
    with tempfile.TemporaryDirectory() as name:
        guests = SocketGuests(room, f"{name}/link")
        server = await asyncio.start_unix_server(guests.serve, guests.path)

        def start(behave: Behaviour = follow_command, faults: PlannedFaults | None = None) -> Hostd:
            guests.behave, guests.faults = behave, faults or PlannedFaults()
            links: SimulatedLinks | SocketLinks = SimulatedLinks(room, behave, guests.faults)
            if request.param == "socket":
                links = SocketLinks(pace=Pace(connect_s=0.01))
            started.append(Hostd(tmp_path, links, guests.path))
            return started[-1]

        yield start
        for hostd in started:
            await hostd.links.close()
        server.close()
        await server.wait_closed()


async def test_a_sandbox_runs_to_its_end(make_hostd: MakeHostd) -> None:
    """Output, exit code and an artifact that names every source arrive; the sandbox is completed."""
    hostd = make_hostd()
    hostd.accept(make_order(("make",)))
    await hostd.until(hostd.has_artifact)
    assert (hostd.phase(), hostd.output("agent-0")) == (Phase.COMPLETED, b"done\n")
    with tarfile.open(hostd.orders.artifact_path(A)) as archive:
        member = archive.extractfile("changes.json")
        assert member is not None
        changes = json.load(member)
    assert changes == {
        "version": 1,
        "sources": [{"guest_path": "/workspace", "digest": DIGEST, "changes": []}],
    }


async def test_an_exit_code_is_told(make_hostd: MakeHostd) -> None:
    """An agent that exits with 3 fails the sandbox with that code, and its artifact still comes."""
    hostd = make_hostd()
    hostd.accept(make_order(("exit", "3"), ("make",)))
    await hostd.until(hostd.has_artifact)
    agents = hostd.orders.progress[A].agents
    assert [(agent.phase, agent.exit_code) for agent in agents] == [(AgentPhase.FAILED, 3), (AgentPhase.COMPLETED, 0)]
    assert hostd.phase() is Phase.FAILED


async def test_a_stop_ends_what_would_run_on(make_hostd: MakeHostd) -> None:
    """An agent that sleeps runs until the owner stops it, and ends by a signal."""
    hostd = make_hostd()
    hostd.accept(make_order(("sleep",)))
    await hostd.until(lambda: hostd.phase() is Phase.RUNNING)
    hostd.accept(make_order(("sleep",), goal=Goal.STOP))
    await hostd.sessions.press_on(A)
    await hostd.until(hostd.has_artifact)
    (agent,) = hostd.orders.progress[A].agents
    assert (hostd.phase(), agent.signal, agent.exit_code) == (Phase.STOPPED, 15, None)


@pytest.mark.parametrize("call", range(1, 16))
async def test_a_broken_link_loses_nothing(make_hostd: MakeHostd, call: int) -> None:
    """Wherever the link breaks, the next session resumes by offset: much output arrives whole and once."""
    hostd = make_hostd(lambda agent: AgentScript(MUCH), PlannedFaults({"link": {call, call + 2}}))
    hostd.accept(make_order(("make",)))
    await hostd.until(hostd.has_artifact)
    assert hostd.output("agent-0") == MUCH
    assert hostd.phase() is Phase.COMPLETED


async def test_a_guest_outlives_hostd(make_hostd: MakeHostd, room: SimulatedHypervisor) -> None:
    """A restarted hostd finds the same guest, configured and running, and does not start its agents again."""
    first = make_hostd()
    first.accept(make_order(("sleep",)))
    await first.until(lambda: first.phase() is Phase.RUNNING)
    await first.crash()
    guest = room.domains[A].guest
    second = make_hostd()
    second.accept(make_order(("sleep",), goal=Goal.STOP))
    await second.until(second.has_artifact)
    assert room.domains[A].guest is guest
    assert (second.phase(), second.output("agent-0"), room.starts[A]) == (Phase.STOPPED, b"done\n", 1)


async def test_a_dead_domain_has_no_link(room: SimulatedHypervisor, make_hostd: MakeHostd) -> None:
    """Nothing is sent to a guest that is gone, and poweroff makes it so."""
    hostd = make_hostd()
    hostd.accept(make_order(("sleep",)))
    await hostd.until(lambda: hostd.phase() is Phase.RUNNING)
    gone = asyncio.Event()
    room.on_change(gone.set)
    await hostd.links.send(A, LinkMessage("poweroff"))
    async with asyncio.timeout(PATIENCE_S):
        await gone.wait()
    assert await room.list_domains() == {A: DomainState.DEAD}
    # A real socket tells a moment later that nobody is there.
    with pytest.raises(UnavailableError):
        await send_on(hostd)


async def test_nothing_is_received_after_detach(make_hostd: MakeHostd) -> None:
    """A detached guest is silent, and cannot be spoken to."""
    hostd = make_hostd()
    received: list[LinkMessage] = []

    async def receive(_sandbox_id: SandboxId, message: LinkMessage) -> None:
        received.append(message)

    hostd.links.attach(A, "/nowhere", receive)
    await hostd.links.detach(A)
    with pytest.raises(UnavailableError):
        await hostd.links.send(A, LinkMessage("stop"))
    assert received == []


async def read_all(running: Exec) -> tuple[bytes, ExecEnded]:
    """What a program says from its start to its end."""
    assert await running.next() == ExecStarted()
    output = b""
    while not isinstance(event := await running.next(), ExecEnded):
        assert isinstance(event, ExecOutput)
        output += event.payload
    return output, event


async def run_agent(hostd: Hostd) -> None:
    hostd.accept(make_order(("sleep",)))
    await hostd.until(lambda: hostd.phase() is Phase.RUNNING)


async def open_exec(hostd: Hostd, *command: str) -> Exec:
    return await hostd.sessions.open_exec(A, Program(command, "/"))


async def test_a_program_runs_beside_the_agents(make_hostd: MakeHostd) -> None:
    """Its exit code comes back, and its agent runs on."""
    hostd = make_hostd()
    await run_agent(hostd)
    assert await read_all(await open_exec(hostd, "exit", "3")) == (b"", ExecEnded(3, None, ""))
    assert hostd.phase() is Phase.RUNNING


async def test_input_comes_back_whole(make_hostd: MakeHostd) -> None:
    """Every byte value, far past the window in both directions, and the host's marker among it."""
    hostd, content = make_hostd(), MAGIC + MUCH
    await run_agent(hostd)
    running = await open_exec(hostd, "cat")

    async def feed() -> None:
        await running.write(content)
        await running.end_input()

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as together:
        together.create_task(feed())
        reading = together.create_task(read_all(running))
    assert reading.result() == (content, ExecEnded(0, None, ""))


async def test_a_caller_that_reads_nothing_holds_up_nobody(make_hostd: MakeHostd) -> None:
    """One program's output waits in its guest, past its window; another's passes it, and all of it comes once it is read."""
    hostd = make_hostd()
    await run_agent(hostd)
    stuck = await open_exec(hostd, "yes", str(len(MUCH)))
    async with asyncio.timeout(PATIENCE_S):
        assert (await read_all(await open_exec(hostd, "yes", str(len(MUCH)))))[0] == b"y" * len(MUCH)
        assert (await read_all(stuck))[0] == b"y" * len(MUCH)


async def test_a_signal_and_a_farewell_end_a_program(make_hostd: MakeHostd) -> None:
    """A program ends by the signal that it is sent; one that its caller leaves is told so, and its place is free again."""
    hostd = make_hostd()
    await run_agent(hostd)
    async with asyncio.timeout(PATIENCE_S):
        running = await open_exec(hostd, "sleep")
        await running.signal(2)
        assert (await read_all(running))[1] == ExecEnded(None, 2, "")
        crowd = [await open_exec(hostd, "sleep") for _ in range(EXECS_MAX)]
        with pytest.raises(UnavailableError) as caught:
            await open_exec(hostd, "exit", "0")
        assert caught.value.code == "execs_exhausted"
        for left in crowd:
            hostd.sessions.abandon_exec(A, left)
        # Each place is free as soon as the guest has said that its program has ended.
        for _ in range(EXECS_MAX):
            await open_when_there_is_room(hostd)


async def open_when_there_is_room(hostd: Hostd) -> Exec:
    while True:
        with contextlib.suppress(UnavailableError):
            return await open_exec(hostd, "sleep")
        await asyncio.sleep(0)


async def test_a_program_ends_with_its_session(make_hostd: MakeHostd, room: SimulatedHypervisor) -> None:
    """A guest that is gone leaves no caller waiting."""
    hostd = make_hostd()
    await run_agent(hostd)
    running = await open_exec(hostd, "sleep")
    assert await running.next() == ExecStarted()
    await hostd.links.send(A, LinkMessage("poweroff"))
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(UnavailableError) as caught:
            await running.next()
    assert caught.value.code == "guest_link_lost"


async def test_no_program_outlives_the_agents(make_hostd: MakeHostd) -> None:
    """Once the agents have ended the guest collects: a program that runs is cut off, and none begins."""
    hostd = make_hostd()
    await run_agent(hostd)
    running = await open_exec(hostd, "sleep")
    assert await running.next() == ExecStarted()
    hostd.accept(make_order(("sleep",), goal=Goal.STOP))
    await hostd.sessions.press_on(A)
    await hostd.until(hostd.has_artifact)
    for attempt in (running.next, lambda: open_exec(hostd, "exit", "0")):
        with pytest.raises(ConflictError) as caught:
            await attempt()
        assert caught.value.code == "not_running"
