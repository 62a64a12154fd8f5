"""Programs and secrets on their way through the scheduler: whole, in order, at the slower side's pace, and for nobody else."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import pytest

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.errors import BedplateError, ConflictError, InvalidSpecError, NotFoundError, UnavailableError
from fleet.identity import SCHEDULER_SERVER_NAME, Role
from fleet.model.admission import SECRET_BYTES_MAX, SECRETS_BYTES_MAX
from fleet.model.ids import HostId
from fleet.rpc import error_from_call, open_channel, responses
from fleet.server import start_server
from fleet.store.keyspace import ROOT
from fleet.store.memory import MemoryStore
from fleet.store.mirror import Mirror
from fleet.store.port import Put
from provisioning.embedded.etcd import LOOPBACK
from provisioning.embedded.pki import tls_files
from scheduler.api.channels import HostChannels
from scheduler.api.execs import EXECS_MAX, ExecService
from scheduler.state import FleetState
from tests.integration.scheduler.far import FarHost, cat, ended, output
from tests.integration.scheduler.parts import HANG_S, Client, Fleet, running
from tests.unit.scheduler.build import record, record_puts, sandbox_id, spec

ID = sandbox_id(0)
# Far more than all buffers on the way together.
FLOOD = 400
CHUNK = b"x" * 65536


@pytest.fixture
async def memory() -> MemoryStore:
    return MemoryStore(monotonic)


@pytest.fixture
async def far(memory: MemoryStore, pki: Path, tmp_path: Path) -> AsyncIterator[FarHost]:
    """A host that carries the sandbox `box-0`."""
    async with FarHost(memory, pki, tmp_path / "far").running() as serving:
        await serving.carry(record(spec=spec(secrets=("TOKEN", "KEY"))))
        yield serving


@pytest.fixture
async def fleet(memory: MemoryStore, pki: Path, far: FarHost) -> AsyncIterator[Fleet]:
    async with Fleet(memory, pki).running() as serving:
        await serving.knows(far.host_id)
        yield serving


@pytest.fixture
def demo(fleet: Fleet) -> Client:
    return fleet.client(Role.TENANT, "demo")


def execs(client: Client) -> Any:
    return service_pb2_grpc.ExecServiceStub(client.channel)


def opening(sandbox: str = "box-0", **values: Any) -> Any:
    return service_pb2.ExecRequest(open=service_pb2.ExecOpen(sandbox=sandbox, command=["cat"], **values))


def entered(payload: bytes) -> Any:
    return service_pb2.ExecRequest(input=payload)


INPUT_END = service_pb2.ExecRequest(input_end=True)


async def open_program(client: Client, sandbox: str = "box-0") -> Any:
    """A call whose program has started."""
    call = execs(client).Exec()
    await call.write(opening(sandbox))
    assert (await call.read()).HasField("started")
    return call


async def refusal_of(call: Any) -> BedplateError:
    """The error that a call must end with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drain(call)
    return error_from_call(caught.value, "scheduler")


async def drain(call: Any) -> list[Any]:
    """The messages of a call, to its end."""
    async with asyncio.timeout(HANG_S):
        heard = []
        while (response := await call.read()) is not grpc.aio.EOF:
            heard.append(response)
        return heard


async def until(holds: Any) -> None:
    async with asyncio.timeout(HANG_S):
        while not holds():  # noqa: ASYNC110 (the far side of a call is no event here)
            await asyncio.sleep(0.01)


async def test_bytes_pass_both_ways(demo: Client, far: FarHost) -> None:
    """Every byte of input arrives once and in order, and so does the answer; resize and signal come through; then it ends."""
    call = await open_program(demo)
    sent = [bytes([number]) * 1000 for number in range(200)]

    async def enter() -> None:
        for payload in sent:
            await call.write(entered(payload))
        await call.write(service_pb2.ExecRequest(resize=service_pb2.TerminalSize(columns=80, rows=24)))
        await call.write(service_pb2.ExecRequest(signal=2))
        await call.write(INPUT_END)

    entering = asyncio.create_task(enter())
    heard = b""
    async with asyncio.timeout(HANG_S):
        while (response := await call.read()) is not grpc.aio.EOF:
            heard += response.stdout
            last = response
    await entering
    assert heard == b"".join(sent)
    assert last.ended.exit_code == 0
    assert await call.code() is grpc.StatusCode.OK
    kinds = [request.WhichOneof("part") for _, request, _ in far.requests]
    assert kinds == ["open", *["input"] * 200, "resize", "signal", "input_end"]


async def test_a_host_is_told_which_sandbox_and_for_whom(demo: Client, fleet: Fleet, far: FarHost) -> None:
    """A name becomes the id with its tenant, and the host learns on whose behalf: what it trusts is the scheduler's word."""
    operator = fleet.client(Role.OPERATOR, "operator")
    for client, tenant in ((demo, ""), (operator, "demo")):
        call = execs(client).Exec()
        await call.write(opening(tenant=tenant, user="root"))
        await call.read()
        call.cancel()
    (_, first, first_actor), (_, second, second_actor) = far.requests
    for request in (first, second):
        assert (request.open.sandbox, request.open.tenant, request.open.user) == (ID, "demo", "root")
    assert (first_actor, second_actor) == ("tenant/demo", "operator/operator")


async def test_a_strangers_sandbox_is_not_entered(fleet: Fleet, far: FarHost) -> None:
    """It is as unknown as one that does not exist, and the host hears nothing."""
    call = execs(fleet.client(Role.TENANT, "other")).Exec()
    await call.write(opening(ID))
    error = await refusal_of(call)
    assert (type(error), error.code) == (NotFoundError, "sandbox_unknown")
    assert far.requests == []


async def test_what_has_no_host_runs_nothing(demo: Client, fleet: Fleet, memory: MemoryStore) -> None:
    """A pending sandbox, and an opening that is none, are told what is missing."""
    wish = replace(record(1), spec=spec(1, require_labels=()))
    committed = await memory.transact([], record_puts(replace(wish, spec=replace(wish.spec, image=IMAGELESS))))
    assert committed.is_committed
    call = execs(demo).Exec()
    await call.write(opening(sandbox_id(1)))
    error = await refusal_of(call)
    assert (type(error), error.code) == (ConflictError, "not_running")
    call = execs(demo).Exec()
    await call.write(entered(b"x"))
    error = await refusal_of(call)
    assert (type(error), error.code) == (InvalidSpecError, "open_missing")


IMAGELESS = replace(spec().image, name="nowhere:1")


async def test_a_slow_reader_holds_the_program_up(demo: Client, far: FarHost) -> None:
    """A program that prints without end is not taken into the scheduler's memory while its client does not read."""
    printed = 0

    async def flood(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        nonlocal printed
        await anext(requests)
        yield service_pb2.ExecResponse(started=service_pb2.ExecStarted())
        for printed in range(1, FLOOD + 1):  # noqa: B007 (read outside)
            yield output(CHUNK)
        yield ended()

    far.program = flood
    call = await open_program(demo)
    seen = -1
    async with asyncio.timeout(HANG_S):
        while seen != printed:
            seen = printed
            await asyncio.sleep(0.2)
    assert seen < FLOOD
    total = 0
    async with asyncio.timeout(HANG_S):
        while (response := await call.read()) is not grpc.aio.EOF:
            total += len(response.stdout)
    assert total == FLOOD * len(CHUNK)


async def test_a_slow_program_holds_its_client_up(demo: Client, far: FarHost) -> None:
    """Input that a program does not read is not taken into the scheduler's memory either."""
    release = asyncio.Event()

    async def lazy(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        first = await anext(requests)
        yield service_pb2.ExecResponse(started=service_pb2.ExecStarted())
        await release.wait()

        async def again() -> AsyncIterator[Any]:
            yield first
            async for request in requests:
                yield request

        async for response in cat(again(), context):
            if not response.HasField("started"):
                yield response

    far.program = lazy
    call = await open_program(demo)
    written = 0

    async def enter() -> None:
        nonlocal written
        for _ in range(FLOOD):
            await call.write(entered(CHUNK))
            written += 1
        await call.write(INPUT_END)

    entering = asyncio.create_task(enter())
    seen = -1
    async with asyncio.timeout(HANG_S):
        while seen != written:
            seen = written
            await asyncio.sleep(0.2)
    assert seen < FLOOD
    release.set()
    total = 0
    async with asyncio.timeout(HANG_S):
        while (response := await call.read()) is not grpc.aio.EOF:
            total += len(response.stdout)
    await entering
    assert total == FLOOD * len(CHUNK)


async def test_a_client_that_goes_ends_its_program(demo: Client, far: FarHost) -> None:
    """Cancelled, or closed with its connection: the call to the host ends too."""
    call = await open_program(demo)
    assert far.execs == 1
    call.cancel()
    await until(lambda: not far.execs)
    await open_program(demo)
    await demo.channel.close()
    await until(lambda: not far.execs)


async def flooding() -> AsyncIterator[Any]:
    """Opens a program and enters more than it reads."""
    yield opening()
    for _ in range(20):
        yield entered(CHUNK)


async def test_a_hosts_error_comes_through(demo: Client, far: FarHost) -> None:
    """Also while input is on its way: code, message and next step are the host's, every time."""

    async def refuse(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        await anext(requests)
        raise ConflictError("not_running", "its agents have ended", "start it with mb start")
        yield

    far.program = refuse

    async def attempt() -> BedplateError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in responses(execs(demo).Exec(flooding())):
                pass
        return error_from_call(caught.value, "scheduler")

    errors = [await attempt() for _ in range(30)]
    assert {(type(error), error.code, error.next_step) for error in errors} == {
        (ConflictError, "not_running", "start it with mb start")
    }


async def test_a_program_that_ends_under_its_input_ends_well(demo: Client, far: FarHost) -> None:
    """Input that crosses the end of its program is no error: the exit code arrives, every time."""

    async def brief(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        await anext(requests)
        yield ended(7)

    far.program = brief

    async def attempt() -> int:
        heard = [response async for response in responses(execs(demo).Exec(flooding()))]
        return int(heard[-1].ended.exit_code)

    assert {await attempt() for _ in range(30)} == {7}


async def test_a_host_that_dies_ends_its_programs(demo: Client, far: FarHost) -> None:
    """The client is told that the host is away, not left waiting."""
    call = await open_program(demo)
    await far.stop()
    error = await refusal_of(call)
    assert isinstance(error, UnavailableError)
    assert error.next_step


async def test_one_caller_has_so_many_programs(demo: Client, fleet: Fleet, far: FarHost) -> None:
    """One more is refused with what to do; another caller has its own; when one ends there is room again."""
    calls = [await open_program(demo) for _ in range(EXECS_MAX)]
    call = execs(demo).Exec()
    # The refusal may come before the request is written.
    with suppress(grpc.aio.AioRpcError):
        await call.write(opening())
    error = await refusal_of(call)
    assert (type(error), error.code) == (UnavailableError, "calls_exhausted")
    operator = execs(fleet.client(Role.OPERATOR, "operator")).Exec()
    await operator.write(opening(tenant="demo"))
    assert (await operator.read()).HasField("started")
    calls[0].cancel()
    await until(lambda: far.execs == EXECS_MAX)
    await open_program(demo)


async def test_a_forgotten_program_is_ended(memory: MemoryStore, pki: Path, far: FarHost) -> None:
    """Silence on both sides for long enough ends a program and says so; a word in time puts that off."""
    mirror = Mirror(memory, ROOT)
    scheduler = tls_files(pki, Role.SCHEDULER, "scheduler")
    channels = HostChannels(scheduler)
    service = ExecService(FleetState(mirror), channels, 0.5)
    permissions = {"bedplate.sandbox.v1.ExecService/Exec": frozenset({Role.TENANT})}
    server, port = await start_server(
        f"{LOOPBACK}:0",
        scheduler,
        permissions,
        lambda server: service_pb2_grpc.add_ExecServiceServicer_to_server(service, server),
    )
    tenant = tls_files(pki, Role.TENANT, "demo")
    async with running(mirror.run()), open_channel(f"{LOOPBACK}:{port}", tenant, SCHEDULER_SERVER_NAME) as channel:
        await mirror.wait_for((await memory.transact([], [Put(ROOT + "now", b"")])).revision, HANG_S)
        error = await refusal_of(await open_program(Client(channel)))
        assert (type(error), error.code) == (UnavailableError, "exec_idle")
        await until(lambda: not far.execs)
    await server.stop(None)
    await channels.close()


def secrets_of(client: Client) -> Any:
    return service_pb2_grpc.SecretServiceStub(client.channel)


def values(*pairs: tuple[str, bytes]) -> Any:
    listed = [service_pb2.Secret(name=name, value=value) for name, value in pairs]
    return service_pb2.SendSecretsRequest(sandbox="box-0", secrets=listed)


async def test_secrets_reach_the_host_only(
    demo: Client, far: FarHost, memory: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values arrive as they are, at the host that has the sandbox; neither log nor store has ever seen one."""
    await secrets_of(demo).SendSecrets(values(("TOKEN", b"hunter2-\x00\xff"), ("KEY", b"s" * SECRET_BYTES_MAX)))
    ((_, request, actor),) = far.requests
    assert (request.sandbox, request.tenant, actor) == (ID, "demo", "tenant/demo")
    assert [(one.name, one.value[:8]) for one in request.secrets] == [("TOKEN", b"hunter2-"), ("KEY", b"ssssssss")]
    captured = capsys.readouterr()
    assert "hunter2" not in captured.out + captured.err
    assert not any(b"hunter2" in entry.value for entry in (await memory.list_prefix("/")).entries)


@pytest.mark.parametrize(
    ("pairs", "code"),
    [
        ([("OTHER", b"hunter2")], "secret_unknown"),
        ([("TOKEN", b"hunter2"), ("TOKEN", b"hunter2")], "secret_doubled"),
        ([("TOKEN", b"hunter2" * SECRET_BYTES_MAX)], "secret_too_large"),
    ],
)
async def test_wrong_secrets_are_refused(demo: Client, far: FarHost, pairs: Any, code: str) -> None:
    """The name is told, never the value, and the host hears nothing."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await secrets_of(demo).SendSecrets(values(*pairs))
    error = error_from_call(caught.value, "scheduler")
    assert (type(error), error.code) == (InvalidSpecError, code)
    assert "hunter2" not in error.message
    assert far.requests == []


async def test_secrets_are_bounded_together(memory: MemoryStore, pki: Path, far: FarHost) -> None:
    """Many values, each within its limit, are too large together."""
    names = tuple(f"S{number}" for number in range(SECRETS_BYTES_MAX // SECRET_BYTES_MAX + 1))
    await far.carry(record(1, spec=spec(1, secrets=names)))
    async with Fleet(memory, pki).running() as fleet:
        await fleet.knows(HostId("far"))
        request = values(*((name, b"v" * SECRET_BYTES_MAX) for name in names))
        request.sandbox = "box-1"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await secrets_of(fleet.client(Role.TENANT, "demo")).SendSecrets(request)
    assert error_from_call(caught.value, "scheduler").code == "secret_too_large"
