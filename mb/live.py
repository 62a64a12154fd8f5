"""What a running sandbox is asked: its output, events and use, programs in it, and the secrets it waits for.

A part of mb.client.Client, with the same promises.
"""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from bedplate.sandbox.v1 import (
    event_pb2,
    event_pb2_grpc,
    explain_pb2,
    explain_pb2_grpc,
    network_pb2,
    network_pb2_grpc,
    sandbox_pb2,
    service_pb2,
    service_pb2_grpc,
)
from fleet.codec import from_message
from fleet.model.egress import NetworkEvent
from fleet.model.event import Event
from fleet.model.explanation import PlacementExplanation
from fleet.model.ids import NO_DIGEST, Digest
from fleet.model.usage import SandboxUsage
from fleet.rpc import responses, translated
from mb.program import Ended, Input, Printed, Program, Sent, Signal

# A call reads or writes a handful of keys; a scheduler that needs longer is in trouble.
CALL_TIMEOUT_S = 15.0
# A past decision reads the whole store as it was then.
RECOMPUTE_TIMEOUT_S = 120.0
# A stream is opened anew after this long, so that no half-dead connection is trusted for ever.
STREAM_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of content or output: where it belongs, and what is known of the whole."""

    offset: int
    payload: bytes
    end: bool = False
    size_bytes: int = 0
    digest: Digest = NO_DIGEST
    placement: int = 0


@dataclass(frozen=True, slots=True)
class OutputRange:
    """Which part of an agent's output is wanted: from a byte, from a time on, or the last lines; 0 says nothing.

    `placement` is the one that the byte is of.
    """

    offset: int = 0
    since_ms: int = 0
    tail_lines: int = 0
    placement: int = 0


class LiveCalls:
    """Calls about running sandboxes to the scheduler that errors name as `peer`."""

    def __init__(self, channel: grpc.aio.Channel, peer: str, tenant: str) -> None:
        self._peer = peer
        self._tenant = tenant
        # grpcio's generated stubs are typed for its synchronous twin.
        self._output: Any = service_pb2_grpc.OutputServiceStub(channel)
        self._execs: Any = service_pb2_grpc.ExecServiceStub(channel)
        self._secrets: Any = service_pb2_grpc.SecretServiceStub(channel)
        self._usages: Any = service_pb2_grpc.UsageServiceStub(channel)
        self._explains: Any = explain_pb2_grpc.ExplainServiceStub(channel)
        self._network: Any = network_pb2_grpc.NetworkServiceStub(channel)
        self._events: Any = event_pb2_grpc.EventServiceStub(channel)

    async def read_output(self, name: str, agent: str, wanted: OutputRange, *, follow: bool) -> AsyncIterator[Chunk]:
        """An agent's output; each chunk says where it belongs, the last one whether the end is final."""
        request = service_pb2.ReadOutputRequest(
            sandbox=name,
            tenant=self._tenant,
            agent=agent,
            offset=wanted.offset,
            follow=follow,
            since_ms=wanted.since_ms,
            tail_lines=wanted.tail_lines,
            placement=wanted.placement,
        )
        with translated(self._peer):
            async for reply in self._output.ReadOutput(request, timeout=STREAM_TIMEOUT_S):
                yield Chunk(reply.offset, reply.payload, reply.end, placement=reply.placement)

    async def explain(self, name: str, *, is_recomputed: bool) -> PlacementExplanation:
        """Why a sandbox is where it is, as of now, or as of its decision, which is made again."""
        request = explain_pb2.ExplainRequest(sandbox=name, tenant=self._tenant, recompute=is_recomputed)
        with translated(self._peer):
            reply = await self._explains.Explain(request, timeout=RECOMPUTE_TIMEOUT_S)
        return from_message(PlacementExplanation, reply)

    async def run_program(self, program: Program, sent: AsyncIterator[Sent]) -> AsyncIterator[Printed | Ended]:
        """Runs a program and passes on what is `sent` to it; yields what it prints and, last, how it ended.

        It lasts as long as the program does: this one call has no deadline, keepalive finds a peer that is gone.
        """
        requests = self._exec_requests(program, sent)
        with translated(self._peer):
            async for reply in responses(self._execs.Exec(requests)):
                part = reply.WhichOneof("part")
                if part in ("stdout", "stderr"):
                    yield Printed(getattr(reply, part), is_error=part == "stderr")
                elif part == "ended":
                    yield _to_ended(reply.ended)
                    return

    async def read_events(self, name: str, since_ms: int, *, follow: bool) -> AsyncIterator[Event]:
        """Events of one sandbox, or of all of the tenant's when `name` is empty; with `follow` later ones too."""
        request = event_pb2.ReadEventsRequest(sandbox=name, tenant=self._tenant, since_ms=since_ms, follow=follow)
        with translated(self._peer):
            async for reply in self._events.ReadEvents(request, timeout=STREAM_TIMEOUT_S):
                yield from_message(Event, reply)

    async def read_network(
        self, name: str, since_ms: int, *, follow: bool, denied: bool
    ) -> AsyncIterator[NetworkEvent]:
        """What left a sandbox or was denied; with `denied` only that, with `follow` later ones too."""
        request = network_pb2.ReadNetworkRequest(
            sandbox=name, tenant=self._tenant, since_ms=since_ms, follow=follow, denied=denied
        )
        with translated(self._peer):
            async for reply in self._network.ReadNetwork(request, timeout=STREAM_TIMEOUT_S):
                yield from_message(NetworkEvent, reply)

    async def send_secrets(self, name: str, values: Mapping[str, bytes]) -> None:
        """Hands values over for the names in a sandbox's spec."""
        secrets = [service_pb2.Secret(name=key, value=value) for key, value in values.items()]
        request = service_pb2.SendSecretsRequest(sandbox=name, tenant=self._tenant, secrets=secrets)
        with translated(self._peer):
            await self._secrets.SendSecrets(request, timeout=CALL_TIMEOUT_S)

    async def read_usage(self) -> tuple[list[SandboxUsage], list[str]]:
        """What running sandboxes use now, and the hosts that did not answer."""
        request = service_pb2.ReadUsageRequest(tenant=self._tenant)
        with translated(self._peer):
            reply = await self._usages.ReadUsage(request, timeout=CALL_TIMEOUT_S)
        return [from_message(SandboxUsage, usage) for usage in reply.usages], list(reply.unreached_hosts)

    async def _exec_requests(self, program: Program, sent: AsyncIterator[Sent]) -> AsyncIterator[Any]:
        size = program.terminal
        opened = service_pb2.ExecOpen(
            sandbox=program.sandbox,
            tenant=self._tenant,
            command=program.command,
            workdir=program.workdir,
            env=[sandbox_pb2.EnvVar(name=name, value=value) for name, value in program.env],
            user=program.user,
            terminal=None if size is None else service_pb2.TerminalSize(columns=size.columns, rows=size.rows),
            term=program.term,
        )
        yield service_pb2.ExecRequest(open=opened)
        async for part in sent:
            yield _to_exec_request(part)


def _to_exec_request(part: Sent) -> Any:
    if isinstance(part, Input):
        is_end = not part.payload
        return service_pb2.ExecRequest(input_end=True) if is_end else service_pb2.ExecRequest(input=part.payload)
    if isinstance(part, Signal):
        return service_pb2.ExecRequest(signal=part.number)
    return service_pb2.ExecRequest(resize=service_pb2.TerminalSize(columns=part.columns, rows=part.rows))


def _to_ended(ended: Any) -> Ended:
    exit_code = ended.exit_code if ended.HasField("exit_code") else None
    return Ended(exit_code, ended.signal if ended.HasField("signal") else None, ended.message)
