"""How programs call each other: gRPC over mutual TLS, one error mapping, one gatekeeper (fleet.gatekeeper) in every server.

An error travels as a gRPC status plus one trailing metadata entry, ERROR_KEY, that holds JSON: `code`, `field`, `next_step`.
"""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fleet.credentials import LiveCredentials
from fleet.errors import BedplateError, InvalidSpecError, UnavailableError
from fleet.gatekeeper import ERROR_KEY, STATUS, Gatekeeper, Permissions
from fleet.gatekeeper import caller_of as caller_of  # noqa: PLC0414 (services find it beside the channels they call)
from fleet.identity import TlsFiles
from fleet.revocation import Revocations

# The largest message of the API: a chunk of 256 KiB, or a listing of some thousand sandboxes.
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
CHUNK_BYTES = 256 * 1024
# What a server takes in one message: a chunk, or a spec far past what admission lets through. Decoding holds the event loop.
REQUEST_BYTES_MAX = 1024 * 1024
# What strangers may send, and how much of it at once: a request for a certificate, from a rack that is set up together.
OPEN_REQUEST_BYTES_MAX = 16 * 1024
OPEN_STREAMS_MAX, OPEN_CALLS_MAX = 4, 64
# An enrolment takes a second; who holds a connection longer, or does not get through the handshake, is let go.
OPEN_CONNECTION_MS_MAX, OPEN_HANDSHAKE_MS_MAX = 60_000, 10_000
KEEPALIVE_MS = 20_000
# A peer that is back is found within this time; left alone, gRPC waits up to two minutes after a long absence (measured: 25 s
# after 90 s).
RECONNECT_MS_MAX = 2_000
STOP_GRACE_S = 5.0
# A status that gRPC has received is handed out within one round of the event loop.
STATUS_WAIT_S = 1.0

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
    # A proxy in the environment must never see fleet traffic.
    ("grpc.enable_http_proxy", 0),
)

_OPEN_OPTIONS = (
    ("grpc.max_concurrent_streams", OPEN_STREAMS_MAX),
    ("grpc.max_connection_age_ms", OPEN_CONNECTION_MS_MAX),
    ("grpc.max_connection_age_grace_ms", OPEN_HANDSHAKE_MS_MAX),
    ("grpc.server_handshake_timeout_ms", OPEN_HANDSHAKE_MS_MAX),
)

_FAMILIES: dict[grpc.StatusCode, type[BedplateError]] = {status: family for family, status in STATUS}


class CallFailed(Protocol):
    """What grpc and grpc.aio errors have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def channel_credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    """Client credentials: trusts the authority only, shows the program's certificate."""
    return LiveCredentials(tls).for_channel()


def channel_options(server_name: str) -> list[tuple[str, Any]]:
    """Options of every channel; the server must prove `server_name`, whatever its address is."""
    return [*_OPTIONS, ("grpc.ssl_target_name_override", server_name)]


def open_channel(address: str, tls: TlsFiles | LiveCredentials, server_name: str) -> grpc.aio.Channel:
    """A channel to the peer at `address` ("ip:port"), under the certificate as it is now."""
    credentials = tls if isinstance(tls, LiveCredentials) else LiveCredentials(tls)
    credentials.refresh()
    return grpc.aio.secure_channel(address, credentials.for_channel(), options=channel_options(server_name))


class LiveChannel:
    """A channel to one peer, opened anew when the certificate's files have changed; calls on the old one go on to their end."""

    def __init__(
        self,
        credentials: LiveCredentials,
        opened: Callable[[grpc.ChannelCredentials], grpc.aio.Channel],
        linger_s: float,
    ) -> None:
        """`opened` makes a channel; calls of an old one that last longer than `linger_s` are cancelled."""
        self._credentials = credentials
        self._opened = opened
        self._linger_s = linger_s
        self._generation = credentials.refresh()
        self._channel = opened(credentials.for_channel())
        self._lingering: dict[grpc.aio.Channel, asyncio.Task[None]] = {}

    def get(self) -> grpc.aio.Channel:
        """The channel for the next call; it may be another one for the call after that."""
        generation = self._credentials.refresh()
        if generation != self._generation:
            old, self._channel = self._channel, self._opened(self._credentials.for_channel())
            self._generation = generation
            self._lingering[old] = asyncio.create_task(old.close(self._linger_s))
            self._lingering[old].add_done_callback(lambda _task: self._lingering.pop(old, None))
        return self._channel

    async def close(self) -> None:
        """Closes it; calls on it end."""
        lingering = dict(self._lingering)
        for channel, task in lingering.items():
            task.cancel()
            await asyncio.wait({task})
            await channel.close()
        await self._channel.close()


def live_channel(address: str, credentials: LiveCredentials, server_name: str, linger_s: float) -> LiveChannel:
    """A channel to the peer at `address` that follows `credentials`."""
    options = channel_options(server_name)
    return LiveChannel(credentials, lambda now: grpc.aio.secure_channel(address, now, options=options), linger_s)


async def start_server(
    address: str,
    tls: TlsFiles,
    permissions: Permissions,
    register: Callable[[grpc.aio.Server], None],
    revocations: Revocations | None = None,
    *,
    servicer: health.aio.HealthServicer | None = None,
) -> tuple[grpc.aio.Server, int]:
    """Serves what `register` adds, to the roles that `permissions` lists for each method; what is not listed, to nobody.

    Calls under a certificate in `revocations` are refused, and those under way are ended when it comes in. Health and reflection
    come with it, for every role; who gives a `servicer` says when what it serves is well.

    Returns the server and its port. Raises UnavailableError `address_in_use` when it cannot listen on `address`.
    """
    server = grpc.aio.server(
        interceptors=[Gatekeeper(permissions, revocations=revocations)], options=_server_options(REQUEST_BYTES_MAX)
    )
    register(server)
    servicer = servicer or health.aio.HealthServicer()
    services = sorted({method.split("/")[0] for method in permissions})
    for name in (*services, health.OVERALL_HEALTH):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server, await _listen(server, address, LiveCredentials(tls).for_server())


async def start_open_server(
    address: str, tls: TlsFiles, methods: frozenset[str], register: Callable[[grpc.aio.Server], None]
) -> tuple[grpc.aio.Server, int]:
    """Serves `methods` of what `register` adds to whoever connects, over TLS without a client's certificate.

    Each of them checks another proof itself. Requests are small and few at a time; there is neither health nor reflection.
    Returns and raises what `start_server` does.
    """
    options = [*_server_options(OPEN_REQUEST_BYTES_MAX), *_OPEN_OPTIONS]
    gatekeeper = Gatekeeper({}, anonymous=methods)
    server = grpc.aio.server(interceptors=[gatekeeper], options=options, maximum_concurrent_rpcs=OPEN_CALLS_MAX)
    register(server)
    return server, await _listen(server, address, LiveCredentials(tls).for_open_server())


def _server_options(request_bytes_max: int) -> list[tuple[str, Any]]:
    receive = ("grpc.max_receive_message_length", request_bytes_max)
    return [receive, *(option for option in _OPTIONS if option[0] != receive[0]), ("grpc.so_reuseport", 0)]


async def _listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    try:
        port = server.add_secure_port(address, credentials)
        await server.start()
    except RuntimeError as error:
        message = f"cannot listen on {address}"
        raise UnavailableError("address_in_use", message, "choose a free address in the configuration") from error
    return int(port)


def error_from_call(error: CallFailed, peer: str) -> BedplateError:
    """The error of fleet.errors behind a failed call to `peer`."""
    status = error.code()
    detail = _error_detail(error)
    message = error.details() or str(status)
    family = _FAMILIES.get(status)
    if family is not None and detail is not None:
        return _rebuild(family, message, detail)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError("deadline_exceeded", f"{peer} did not answer in time", "try again")
    if status is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(
            "unreachable", f"{peer} cannot be reached: {message}", "check its address and that it runs"
        )
    return BedplateError(f"call_{status.name.lower()}", f"{peer}: {message}", f"see the log of {peer}")


async def responses(call: Any) -> AsyncGenerator[Any, None]:
    """All messages of a call whose requests come from an iterator, then its error by the peer's word, if it has one.

    A write that crosses the end makes grpc.aio say INTERNAL, also where the peer ended well and where its status was there before
    (https://github.com/grpc/grpc/issues/36066); `call.read()` then loses what has arrived and was not read, iteration does not.
    """
    end = _CallEnd(call)
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as error:
        said = await end.reread(error)
        if said is not None:
            raise said from error


class _CallEnd:
    """How a call ended by its peer's word, noted as it arrives."""

    def __init__(self, call: Any) -> None:
        self._error: grpc.aio.AioRpcError | None = None
        self._is_known = asyncio.Event()
        call.add_done_callback(self._note)

    async def reread(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError | None:
        """What should have been raised instead of `error`: the peer's error, or None when the peer ended well."""
        if _is_peers(error.code(), error.trailing_metadata()):
            return error
        try:
            async with asyncio.timeout(STATUS_WAIT_S):
                await self._is_known.wait()
        except TimeoutError:
            return error
        return self._error

    def _note(self, call: Any) -> None:
        reads = (call.code, call.initial_metadata, call.trailing_metadata, call.details)
        code, initial, trailing, details = (_at_once(read()) for read in reads)
        if not self._is_known.is_set() and code is not None and _is_peers(code, trailing):
            if code is not grpc.StatusCode.OK:
                self._error = grpc.aio.AioRpcError(code, initial, trailing, details)
            self._is_known.set()


def _is_peers(code: grpc.StatusCode, trailing: Any) -> bool:
    # Our servers' own INTERNAL carries ERROR_KEY.
    return code is not grpc.StatusCode.INTERNAL or bool(trailing)


def _at_once(coroutine: Any) -> Any:
    # A call that has ended answers without waiting; a task for it would run when the answer is overwritten.
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    return None


@contextmanager
def translated(peer: str) -> Iterator[None]:
    """Within it, a failed call to `peer` raises its error of fleet.errors."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_call(error, peer) from error


def _error_detail(error: CallFailed) -> dict[str, str] | None:
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY:
            with suppress(ValueError, RecursionError):
                detail = json.loads(value)
                return detail if isinstance(detail, dict) else None
    return None


def _rebuild(family: type[BedplateError], message: str, detail: dict[str, str]) -> BedplateError:
    code, field, next_step = (str(detail.get(name, "")) for name in ("code", "field", "next_step"))
    if family is InvalidSpecError and field:
        return InvalidSpecError(code, message.removeprefix(f"{field}: "), next_step, field=field)
    return family(code, message, next_step)
