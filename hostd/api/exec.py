"""Serves programs in guests, beside the agents: a call is a program, and ends with it. The scheduler has authorised the caller."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.errors import BedplateError, InvalidSpecError, UnavailableError
from fleet.gatekeeper import actor_of
from fleet.model.assignment import Assignment
from hostd.api.lookup import find_order
from hostd.orders import Orders
from hostd.reconcile.execs import Exec, ExecEnded, ExecEvent, ExecOutput, ExecStarted, Program, Terminal
from hostd.reconcile.session import Sessions
from hostd.reconcile.words import SIGNAL_MAX

# The caller has its request ready when it calls; whoever sends none for so long holds no call open.
OPEN_S_MAX = 30.0
# All of it travels in one header of the guest link (16 KiB, docs/guest-link.md) as JSON; its own numbers and keys take under 1 KiB.
PROGRAM_BYTES_MAX = 15 * 1024
# As the kernel keeps them (struct winsize). A guest that lays out a screen of 65,535 squares harms itself only.
TERMINAL_SIDE_MAX = 65_535
DEFAULT_TERM = "xterm"
USERS = ("agent", "root")

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_TERM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


class ExecService(service_pb2_grpc.ExecServiceServicer):
    """Programs in the guests of this host."""

    def __init__(self, orders: Orders, sessions: Sessions) -> None:
        self._orders = orders
        self._sessions = sessions

    async def Exec(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802 (the stub's name)
        """Runs what the first request opens; output waits for nobody but this caller."""
        opened = await _read_open(request_iterator)
        order = find_order(self._orders, opened.sandbox, opened.tenant)
        wanted, actor = parse_program(opened, order), actor_of(context)
        running = await self._sessions.open_exec(order.sandbox_id, wanted, actor)

        def leave(_context: object = None) -> None:
            self._sessions.abandon_exec(order.sandbox_id, running)

        # A cancelled call may leave this generator standing until it is collected.
        context.add_done_callback(leave)
        feeder = asyncio.create_task(_feed(running, request_iterator, has_terminal=wanted.terminal is not None))
        how = "left by its caller"
        try:
            while True:
                event = await running.next()
                if isinstance(event, ExecEnded):
                    how = f"signal {event.signal}" if event.signal else f"exit code {event.exit_code}"
                yield _render(event)
                if isinstance(event, ExecEnded):
                    return
        except BedplateError as error:
            how = error.code
            raise
        finally:
            feeder.cancel()
            leave()
            self._sessions.note_exec_end(order, wanted, how, actor)


def parse_program(opened: Any, order: Assignment) -> Program:
    """The program that an ExecOpen asks for; raises InvalidSpecError naming the field. Without `workdir`, the first agent's."""
    if not opened.command:
        raise _invalid("command", "command_missing", "it is empty", "name a program: mb exec NAME -- ls")
    env = tuple((variable.name, variable.value) for variable in opened.env)
    for name, _ in env:
        if not _ENV_NAME.fullmatch(name):
            raise _invalid("env", "env_invalid", f"{name[:40]!r} is no variable's name", "use letters, digits and _")
    workdir = opened.workdir or order.spec.agents[0].workdir
    if not workdir.startswith("/"):
        raise _invalid(
            "workdir", "workdir_invalid", f"{workdir[:80]!r} is not absolute", "write for example /workspace"
        )
    user = opened.user or USERS[0]
    if user not in USERS:
        raise _invalid("user", "user_invalid", f"{user[:40]!r} is no user that can be had", "use agent or root")
    program = Program(tuple(opened.command), workdir, env, user, _parse_terminal(opened))
    told = json.dumps(program.describe(0))
    if len(told) > PROGRAM_BYTES_MAX:
        message = f"with directory and environment it takes {len(told)} bytes as JSON, more than {PROGRAM_BYTES_MAX}"
        raise _invalid("command", "command_too_long", message, "put it into a file in the sandbox: mb cp")
    if "\\u0000" in told and any("\0" in text for text in (*program.command, workdir, *(value for _, value in env))):
        raise _invalid("command", "command_invalid", "it has a NUL byte, which no program can be given", "leave it out")
    return program


def _parse_terminal(opened: Any) -> Terminal | None:
    if not opened.HasField("terminal"):
        return None
    columns, rows = _parse_size(opened.terminal)
    term = opened.term or DEFAULT_TERM
    if not _TERM.fullmatch(term):
        raise _invalid("term", "term_invalid", f"{term[:40]!r} is no terminal's name", "use for example xterm")
    return Terminal(columns, rows, term)


def _parse_size(size: Any) -> tuple[int, int]:
    for side in (size.columns, size.rows):
        if not 1 <= side <= TERMINAL_SIDE_MAX:
            message = f"{side} is not from 1 to {TERMINAL_SIDE_MAX}"
            raise _invalid("terminal", "terminal_invalid", message, "give its columns and rows")
    return size.columns, size.rows


async def _read_open(requests: AsyncIterator[Any]) -> Any:
    try:
        async with asyncio.timeout(OPEN_S_MAX):
            first = await anext(requests, None)
    except TimeoutError as error:
        message = f"no request came within {OPEN_S_MAX:.0f} s"
        raise UnavailableError("exec_unopened", message, "send open first") from error
    if first is None or first.WhichOneof("part") != "open":
        raise _invalid("open", "open_missing", "the first request does not open a program", "send open first")
    return first.open


async def _feed(running: Exec, requests: AsyncIterator[Any], *, has_terminal: bool) -> None:
    """Gives the program what its caller sends; a request that makes no sense ends the call with its error."""
    has_ended_input = False
    try:
        async for request in requests:
            part = request.WhichOneof("part")
            if part == "input" and not has_ended_input:
                await running.write(request.input)
            elif part == "input_end" and not has_ended_input:
                has_ended_input = True
                await running.end_input()
            elif part == "resize" and has_terminal:
                await running.resize(*_parse_size(request.resize))
            elif part == "signal" and 1 <= request.signal <= SIGNAL_MAX:
                await running.signal(request.signal)
            else:
                message = f"{part or 'an empty request'} is out of place, or past its limits"
                raise _invalid("part", "request_invalid", message, "send input before its end, resize with a terminal")
        if not has_ended_input:
            await running.end_input()
    except BedplateError as error:
        running.cut_off(error)


def _render(event: ExecEvent) -> Any:
    match event:
        case ExecStarted():
            return service_pb2.ExecResponse(started=service_pb2.ExecStarted())
        case ExecOutput(stream="stdout"):
            return service_pb2.ExecResponse(stdout=event.payload)
        case ExecOutput():
            return service_pb2.ExecResponse(stderr=event.payload)
        case ExecEnded():
            ended = service_pb2.ExecEnded(exit_code=event.exit_code, signal=event.signal, message=event.message)
            return service_pb2.ExecResponse(ended=ended)


def _invalid(field: str, code: str, message: str, next_step: str) -> InvalidSpecError:
    return InvalidSpecError(code, message, next_step, field=field)
