"""Serves agents' output from any byte offset. Requests name sandboxes by id: the scheduler has resolved and authorised them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.errors import InvalidSpecError, NotFoundError
from fleet.model.ids import SandboxId, Tenant
from fleet.model.sandbox import Goal, StageName
from fleet.rpc import CHUNK_BYTES
from hostd.api.changes import Changes
from hostd.moments import find_moment, find_tail
from hostd.orders import Orders
from hostd.reconcile.progress import Progress, current_run, find_agent, has_stage, is_over
from hostd.reconcile.words import OUTPUT_BYTES_MAX

# The last lines are searched for from the end; past so many, all of it is the better question.
TAIL_LINES_MAX = 10_000


class OutputService(service_pb2_grpc.OutputServiceServicer):
    """Reads the output files that the sessions write."""

    def __init__(self, orders: Orders, changes: Changes) -> None:
        self._orders = orders
        self._changes = changes

    async def ReadOutput(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002, N802 (the stub's names)
        """Chunks from `offset` on; with `follow` until nothing can follow any more."""
        sandbox_id = SandboxId(request.sandbox)
        agent = self._agent_name(sandbox_id, Tenant(request.tenant), request.agent)
        path = self._orders.output_path(sandbox_id, agent)
        offset = request.offset
        if offset > OUTPUT_BYTES_MAX:
            message = f"{offset} is past the {OUTPUT_BYTES_MAX} bytes that an agent may print"
            raise InvalidSpecError("offset_invalid", message, "read from 0", field="offset")
        offset = max(offset, await asyncio.to_thread(_find_start, path, request.since_ms, request.tail_lines))
        while True:
            # Whether the end is reached is asked before reading: what is written in between belongs to the next round.
            changed = self._changes.subscribe()
            is_final = self._is_final(sandbox_id, agent)
            while chunk := await asyncio.to_thread(_read, path, offset):
                yield service_pb2.OutputChunk(offset=offset, payload=chunk)
                offset += len(chunk)
            if is_final or not request.follow:
                yield service_pb2.OutputChunk(offset=offset, end=is_final)
                return
            await changed.wait()

    def _agent_name(self, sandbox_id: SandboxId, tenant: Tenant, name: str) -> str:
        order = self._orders.orders.get(sandbox_id)
        progress = self._orders.progress.get(sandbox_id)
        if order is None or progress is None or order.tenant != tenant:
            raise NotFoundError("sandbox_unknown", f"sandbox {sandbox_id} is not on this host", "see mb ls")
        names = [agent.name for agent in order.spec.agents]
        if not name and len(names) == 1:
            return names[0]
        if name not in names:
            message = f"the sandbox has no agent {name!r}; it has {', '.join(names)}"
            raise InvalidSpecError("agent_unknown", message, "name one of them", field="agent")
        return name

    def _is_final(self, sandbox_id: SandboxId, agent: str) -> bool:
        order, progress = self._orders.orders.get(sandbox_id), self._orders.progress.get(sandbox_id)
        if order is None or progress is None:
            return True
        return _is_agent_final(current_run(progress, order), agent, order.goal)


def _is_agent_final(progress: Progress, agent: str, goal: Goal) -> bool:
    # An ended agent's last output may still be on its way; once the artifact is asked for, all of it has arrived.
    has_all = has_stage(progress, StageName.AGENTS_ENDED)
    return is_over(progress, goal) or (has_all and find_agent(progress, agent) is not None)


def _find_start(path: Path, since_ms: int, tail_lines: int) -> int:
    """The offset from which on output is asked for, by time and by lines."""
    if tail_lines > TAIL_LINES_MAX:
        message = f"{tail_lines} is more than {TAIL_LINES_MAX}"
        raise InvalidSpecError("tail_invalid", message, "ask for fewer lines, or for all", field="tail_lines")
    since = find_moment(path, since_ms) if since_ms > 0 else 0
    return max(since, find_tail(path, tail_lines) if tail_lines else 0)


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(CHUNK_BYTES)
    except FileNotFoundError:
        return b""
