"""Programs and secrets of guests through real gRPC and mutual TLS, over real guest links to a simulated guest."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.certificates import create_authority
from fleet.errors import (
    BedplateError,
    ConflictError,
    InvalidSpecError,
    NotFoundError,
    UnavailableError,
)
from fleet.gatekeeper import ACTOR_KEY
from fleet.identity import Identity, Role, host_server_name
from fleet.model.assignment import Assignment
from fleet.model.host import Accelerator
from fleet.model.ids import Digest
from fleet.model.sandbox import Agent, Goal, SandboxSpec
from fleet.rpc import open_channel, translated
from fleet.server import start_server
from hostd.api.exec import PROGRAM_BYTES_MAX, ExecService
from hostd.api.permissions import PERMISSIONS
from hostd.api.secrets import SecretService
from hostd.drivers.simulated import SimulatedHypervisor, SimulatedLinks
from hostd.journal import Cursor
from hostd.orders import Orders
from hostd.reconcile.execs import EXECS_MAX, Program
from hostd.reconcile.patience import SECRETS_AWAITED
from hostd.reconcile.progress import begin
from hostd.reconcile.session import EXECS_BURST, Sessions
from hostd.reconcile.state import BootFiles, Machine
from provisioning.embedded.pki import add_certificate, tls_files
from tests.integration.hostd.parts import ACME, HOST, A, B
from tests.integration.hostd.talk import Talk

pytestmark = pytest.mark.timeout(60)
DIGEST = Digest("sha256:" + "0" * 64)
CALL_S = 20.0
MUCH = bytes(range(256)) * 6_000


@dataclass
class Site:
    """One host whose sandbox A runs, and a scheduler's view of it."""

    room: SimulatedHypervisor
    orders: Orders
    links: SimulatedLinks
    sessions: Sessions
    stub: Any = None
    secrets: Any = None

    def call(self, *requests: Any) -> Any:
        """A call that has sent so many requests, and may send more."""
        return self.stub.Exec(_each(requests), timeout=CALL_S, metadata=on_behalf_of("tenant/lab"))

    def running(self) -> int:
        """How many programs the guest has."""
        guest = self.room.domains[A].guest
        assert guest is not None
        return len(guest.programs.running)


def on_behalf_of(actor: str) -> tuple[tuple[str, str], ...]:
    """As the scheduler names who called it."""
    return ((ACTOR_KEY, actor),)


async def _each(requests: tuple[Any, ...]) -> AsyncIterator[Any]:
    for request in requests:
        yield request


def opening(*command: str, **fields: Any) -> Any:
    return service_pb2.ExecRequest(
        open=service_pb2.ExecOpen(**{"sandbox": A, "tenant": ACME, "command": command, **fields})
    )


def given(content: bytes) -> Any:
    return service_pb2.ExecRequest(input=content)


async def collect(call: Any) -> tuple[bytes, Any]:
    """What was printed, and the end; the start came first, and once."""
    printed, parts, end = b"", [], None
    with translated("host"):
        while (response := await call.read()) is not grpc.aio.EOF:
            parts.append(response.WhichOneof("part"))
            printed += response.stdout
            end = response.ended if parts[-1] == "ended" else None
    assert parts[0] == "started"
    assert parts.count("started") == parts.count("ended") == 1
    return printed, end


async def refusal(call: Any) -> BedplateError:
    with pytest.raises(BedplateError) as caught:
        await collect(call)
    return caught.value


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """A host on simulated links; the agent of A runs until it is stopped."""
    room, orders, moved = SimulatedHypervisor(), Orders(tmp_path / "state"), asyncio.Event()
    links = SimulatedLinks(room)
    site = Site(room, orders, links, Sessions(orders, links, moved.set, lambda: 1_000))
    for sandbox_id in (A, B):
        spec = SandboxSpec("box", agents=(Agent("one", "custom", ("sleep",)),))
        order = Assignment(sandbox_id, ACME, HOST, spec, DIGEST, 64, Goal.RUN, 1, 1, 1)
        orders.put_progress(begin(order, "", ""))
        orders.put_order(order)
    boot = BootFiles(DIGEST, "/k", "/i", "/r", "")
    await room.ensure_domain(
        Machine(A, "acme", 1, 256, 64, Accelerator.SIMULATED, boot, "/s", "/l", "/c", "generation-1")
    )
    site.sessions.attach(A, "")
    while not any(agent.started_at_ms for agent in orders.progress[A].agents):
        await moved.wait()
        moved.clear()
    now = datetime.datetime.now(datetime.UTC)
    authority = create_authority(now)
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    for identity in (Identity(Role.HOST, HOST), Identity(Role.SCHEDULER, "scheduler")):
        add_certificate(tmp_path, authority, identity, now)

    def register(server: grpc.aio.Server) -> None:
        service_pb2_grpc.add_ExecServiceServicer_to_server(ExecService(orders, site.sessions), server)
        service_pb2_grpc.add_SecretServiceServicer_to_server(SecretService(orders, site.sessions), server)

    server, port = await start_server("127.0.0.1:0", tls_files(tmp_path, Role.HOST, HOST), PERMISSIONS, register)
    tls = tls_files(tmp_path, Role.SCHEDULER, "scheduler")
    async with open_channel(f"127.0.0.1:{port}", tls, host_server_name(HOST)) as channel:
        site.stub = service_pb2_grpc.ExecServiceStub(channel)
        site.secrets = service_pb2_grpc.SecretServiceStub(channel)
        yield site
    await server.stop(None)
    await links.close()


async def test_a_call_is_a_program(site: Site) -> None:
    """Started, output, ended with its code; nothing runs afterwards."""
    printed, end = await collect(site.call(opening("yes", "300000")))
    assert (printed, end.exit_code, end.HasField("signal")) == (b"y" * 300_000, 0, False)
    _, end = await collect(site.call(opening("exit", "3")))
    assert end.exit_code == 3
    assert site.running() == 0


async def test_programs_are_written_down(site: Site) -> None:
    """Start and end of each, for whom, with the command's first word and never its arguments."""
    await collect(site.call(opening("exit", "3")))
    left = site.stub.Exec(timeout=CALL_S, metadata=on_behalf_of("operator/root"))
    await left.write(opening("sleep", "hunter2"))
    assert (await left.read()).WhichOneof("part") == "started"
    site.links.break_session(A)
    await refusal(left)
    events, _ = site.orders.journal.read(Cursor(), A)
    assert [(event.kind, event.actor, event.detail) for event in events if event.kind.startswith("exec.")] == [
        ("exec.started", "tenant/lab", "exit"),
        ("exec.ended", "tenant/lab", "exit: exit code 3"),
        ("exec.started", "operator/root", "sleep"),
        ("exec.ended", "operator/root", "sleep: guest_link_lost"),
    ]


async def test_a_program_that_found_no_place_is_written_down_to_its_end(site: Site) -> None:
    """Whoever reads the journal finds no program that seems to run still."""
    crowd = [await site.sessions.open_exec(A, Program(("sleep",), "/")) for _ in range(EXECS_MAX)]
    assert (await refusal(site.call(opening("exit", "3")))).code == "execs_exhausted"
    events, _ = site.orders.journal.read(Cursor(), A)
    assert [(event.kind, event.detail) for event in events[-2:]] == [
        ("exec.started", "exit"),
        ("exec.ended", "exit: execs_exhausted"),
    ]
    assert len(crowd) == EXECS_MAX


async def test_programs_in_a_loop_do_not_push_others_out_of_the_journal(tmp_path: Path) -> None:
    """One tenant's loop writes so many lines and then at a rate: the journal is one for all tenants of a host."""
    talk = Talk(tmp_path)
    await talk.run()
    refused = 0
    for _ in range(3 * int(EXECS_BURST)):
        talk.sessions.note_exec_end(talk.orders.orders[A], Program(("true",), "/"), "exit code 0")
        opening = asyncio.create_task(talk.sessions.open_exec(A, Program(("true",), "/")))
        await asyncio.sleep(0)
        opening.cancel()
        (ended,) = await asyncio.gather(opening, return_exceptions=True)
        refused += isinstance(ended, UnavailableError) and "a second" in ended.message
    events, _ = talk.orders.journal.read(Cursor(), A)
    assert sum(event.kind == "exec.started" for event in events) <= EXECS_BURST
    assert refused


async def test_input_goes_in_and_comes_back(site: Site) -> None:
    """More than a window of it, and its end is the program's."""
    requests = [given(MUCH[start : start + 100_000]) for start in range(0, len(MUCH), 100_000)]
    printed, end = await collect(site.call(opening("cat"), *requests, service_pb2.ExecRequest(input_end=True)))
    assert (printed == MUCH, end.exit_code) == (True, 0)


async def test_the_end_of_the_requests_is_the_end_of_the_input(site: Site) -> None:
    """A caller that closes its side has no more to say, and still gets all that follows."""
    printed, end = await collect(site.call(opening("cat"), given(b"hello")))
    assert (printed, end.exit_code) == (b"hello", 0)


async def until_running(site: Site, count: int) -> None:
    """Each look is a turn of the loop in which everything else goes on; the test's own limit ends it."""
    while site.running() != count:  # noqa: ASYNC110 (the guest tells nobody)
        await asyncio.sleep(0.001)


async def test_a_caller_that_cancels_ends_the_program(site: Site) -> None:
    """Whatever it waits for: a program that says nothing, one whose output nobody reads, and one that reads nothing."""
    silent = site.stub.Exec(timeout=CALL_S)
    await silent.write(opening("sleep"))
    assert (await silent.read()).WhichOneof("part") == "started"
    unread = site.stub.Exec(timeout=CALL_S)
    await unread.write(opening("yes", "50000000"))
    assert (await unread.read()).WhichOneof("part") == "started"
    assert site.running() == 2
    silent.cancel()
    unread.cancel()
    await until_running(site, 0)


async def test_a_caller_that_vanishes_ends_its_programs(site: Site, tmp_path: Path) -> None:
    """A deadline that passes is as good as a farewell."""
    call = site.stub.Exec(timeout=0.2)
    await call.write(opening("sleep"))
    assert (await refusal(call)).code == "deadline_exceeded"
    await until_running(site, 0)


async def test_a_signal_reaches_the_program(site: Site) -> None:
    """By number, and the end tells it."""
    _, end = await collect(site.call(opening("sleep"), service_pb2.ExecRequest(signal=15)))
    assert (end.signal, end.HasField("exit_code")) == (15, False)


async def test_a_terminal_can_be_resized(site: Site) -> None:
    """With a terminal a resize is no offence, without one it is."""
    size = service_pb2.TerminalSize(columns=80, rows=24)
    resize = service_pb2.ExecRequest(resize=service_pb2.TerminalSize(columns=100, rows=40))
    quit_ = service_pb2.ExecRequest(signal=3)
    _, end = await collect(site.call(opening("sleep", terminal=size, term="xterm-256color"), resize, quit_))
    assert end.signal == 3
    refused = await refusal(site.call(opening("sleep"), resize))
    assert (type(refused), refused.code) == (InvalidSpecError, "request_invalid")
    await until_running(site, 0)


WRONG = {
    "command_missing": opening(),
    "command_too_long": opening("x" * PROGRAM_BYTES_MAX),
    "command_invalid": opening("echo", "a\0b"),
    "env_invalid": opening("ls", env=[{"name": "A-B", "value": "c"}]),
    "workdir_invalid": opening("ls", workdir="workspace"),
    "user_invalid": opening("ls", user="daemon"),
    "terminal_invalid": opening("ls", terminal=service_pb2.TerminalSize(columns=80)),
    "term_invalid": opening("ls", terminal=service_pb2.TerminalSize(columns=80, rows=24), term="x y"),
    "open_missing": given(b"x"),
}


@pytest.mark.parametrize("code", WRONG)
async def test_what_cannot_be_run_is_refused(site: Site, code: str) -> None:
    """Each with its field, before the guest hears of it."""
    refused = await refusal(site.call(WRONG[code]))
    assert (type(refused), refused.code) == (InvalidSpecError, code)
    assert refused.next_step


async def test_a_call_that_opens_nothing_is_refused(site: Site) -> None:
    """No request at all."""
    assert (await refusal(site.call())).code == "open_missing"


@pytest.mark.parametrize("fields", [{"tenant": "other"}, {"sandbox": "cccccccccccc"}, {"sandbox": "../etc"}])
async def test_another_tenants_sandbox_is_unknown(site: Site, fields: dict[str, str]) -> None:
    """A sandbox that is not the tenant's, or not on this host, does not exist."""
    refused = await refusal(site.call(opening("ls", **fields)))
    assert (type(refused), refused.code) == (NotFoundError, "sandbox_unknown")


async def test_programs_run_only_while_agents_do(site: Site) -> None:
    """A sandbox that starts says wait, one that has ended says so; a program is not begun in either."""
    refused = await refusal(site.call(opening("ls", sandbox=B)))
    assert (type(refused), refused.code) == (UnavailableError, "not_running")
    running = site.call(opening("sleep"), service_pb2.ExecRequest(input=b"x"))
    assert (await running.read()).WhichOneof("part") == "started"
    site.orders.put_order(replace(site.orders.orders[A], goal=Goal.STOP))
    await site.sessions.press_on(A)
    refused = await refusal(site.call(opening("ls")))
    assert (type(refused), refused.code) == (ConflictError, "not_running")
    with pytest.raises(ConflictError), translated("host"):
        await running.read()


async def test_a_link_that_breaks_is_told(site: Site) -> None:
    """The program is gone with its session, and its caller hears why; the next one runs."""
    call = site.stub.Exec(timeout=CALL_S)
    await call.write(opening("sleep"))
    assert (await call.read()).WhichOneof("part") == "started"
    site.links.break_session(A)
    with pytest.raises(UnavailableError) as caught, translated("host"):
        await call.read()
    assert caught.value.code == "guest_link_lost"
    _, end = await collect(site.call(opening("exit", "0")))
    assert end.exit_code == 0


async def test_so_many_programs_and_no_more(site: Site) -> None:
    """One too many is refused with a next step; the others run on."""
    calls = [site.stub.Exec(timeout=CALL_S) for _ in range(EXECS_MAX)]
    for call in calls:
        await call.write(opening("sleep"))
        assert (await call.read()).WhichOneof("part") == "started"
    refused = await refusal(site.call(opening("ls")))
    assert (type(refused), refused.code) == (UnavailableError, "execs_exhausted")
    assert site.running() == EXECS_MAX
    for call in calls:
        call.cancel()
    await until_running(site, 0)


async def test_a_slow_caller_holds_up_no_other(site: Site) -> None:
    """While one call's output waits unread, another's comes whole; then the first one's does."""
    slow = site.stub.Exec(timeout=CALL_S)
    await slow.write(opening("yes", "20000000"))
    await slow.done_writing()
    assert (await slow.read()).WhichOneof("part") == "started"
    printed, _ = await collect(site.call(opening("yes", "5000000")))
    assert len(printed) == 5_000_000
    rest = 0
    while (response := await slow.read()) is not grpc.aio.EOF:
        rest += len(response.stdout)
    assert rest == 20_000_000


async def test_secrets_arrive(site: Site) -> None:
    """Values for a sandbox that awaits them are taken, wrong ones and another tenant's refused."""
    order = site.orders.orders[B]
    site.orders.put_order(replace(order, spec=replace(order.spec, secrets=("KEY",))))

    async def send(name: str, tenant: str = ACME) -> None:
        secrets = [service_pb2.Secret(name=name, value=b"\0\xff")]
        with translated("host"):
            await site.secrets.SendSecrets(
                service_pb2.SendSecretsRequest(sandbox=B, tenant=tenant, secrets=secrets),
                timeout=CALL_S,
                metadata=on_behalf_of("operator/root"),
            )

    for name, tenant, kind in (("OTHER", ACME, InvalidSpecError), ("KEY", "other", NotFoundError)):
        with pytest.raises(kind):
            await send(name, tenant)
    assert site.sessions.notice(B) == SECRETS_AWAITED
    await send("KEY")
    await send("KEY")
    assert site.sessions.notice(B) is None
    events, _ = site.orders.journal.read(Cursor(), B)
    received = [(event.actor, event.detail) for event in events if event.kind == "secrets.received"]
    # Once: whoever sends them without end fills no journal.
    assert received == [("operator/root", "KEY")]
