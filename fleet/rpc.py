"""How programs call each other: gRPC over mutual TLS, one error mapping, one place that checks roles.

An error travels as a gRPC status plus one trailing metadata entry, ERROR_KEY, that holds JSON: `code`, `field`, `next_step`.
"""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fleet.errors import (
    BedplateError,
    ConflictError,
    HostFaultError,
    InvalidSpecError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
)
from fleet.identity import Identity, Role, TlsFiles, parse_identity

ERROR_KEY = "bedplate-error-bin"
# The largest message of the API: a chunk of 256 KiB, or a listing of some thousand sandboxes.
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
CHUNK_BYTES = 256 * 1024
# What a server takes in one message: a chunk, or a spec far past what admission lets through. Decoding holds the event loop.
REQUEST_BYTES_MAX = 1024 * 1024
# An error travels in HTTP/2 headers, of which a peer takes 8 KiB in all; percent-encoding makes up to 12 bytes of a character.
ERROR_MESSAGE_CHARS_MAX = 400
ERROR_FIELD_CHARS_MAX = 160
KEEPALIVE_MS = 20_000
# A peer that is back is found within this time; left alone, gRPC waits up to two minutes after a long absence (measured: 25 s
# after 90 s).
RECONNECT_MS_MAX = 2_000
STOP_GRACE_S = 5.0

# health and reflection say nothing about tenants: any certificate of the authority may read them.
_OPEN_SERVICES = (health.SERVICE_NAME, reflection.SERVICE_NAME)

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

_STATUS = (
    (InvalidSpecError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotPermittedError, grpc.StatusCode.PERMISSION_DENIED),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (ConflictError, grpc.StatusCode.ALREADY_EXISTS),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (HostFaultError, grpc.StatusCode.FAILED_PRECONDITION),
)
_FAMILIES: dict[grpc.StatusCode, type[BedplateError]] = {status: family for family, status in _STATUS}

log = structlog.get_logger()


class CallFailed(Protocol):
    """What grpc and grpc.aio errors have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def channel_credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    """Client credentials: trusts the authority only, shows the program's certificate."""
    ca, pair = tls.load()
    return grpc.ssl_channel_credentials(ca, pair.key, pair.certificate)


def channel_options(server_name: str) -> list[tuple[str, Any]]:
    """Options of every channel; the server must prove `server_name`, whatever its address is."""
    return [*_OPTIONS, ("grpc.ssl_target_name_override", server_name)]


def open_channel(address: str, tls: TlsFiles, server_name: str) -> grpc.aio.Channel:
    """A channel to the peer at `address` ("ip:port")."""
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=channel_options(server_name))


async def start_server(
    address: str,
    tls: TlsFiles,
    roles: Mapping[str, frozenset[Role]],
    register: Callable[[grpc.aio.Server], None],
) -> tuple[grpc.aio.Server, int]:
    """Serves what `register` adds, to the roles listed per full service name, or per "service/Method" where one differs.

    Health and reflection come with it.

    Returns the server and its port. Raises UnavailableError `address_in_use` when it cannot listen on `address`.
    """
    ca, pair = tls.load()
    credentials = grpc.ssl_server_credentials(
        [(pair.key, pair.certificate)], root_certificates=ca, require_client_auth=True
    )
    receive = ("grpc.max_receive_message_length", REQUEST_BYTES_MAX)
    options = [receive, *(option for option in _OPTIONS if option[0] != receive[0]), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(interceptors=[Gatekeeper(roles)], options=options)
    register(server)
    servicer = health.aio.HealthServicer()
    services = [name for name in roles if "/" not in name]
    for name in (*services, health.OVERALL_HEALTH):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*services, *_OPEN_SERVICES), server)
    try:
        port = server.add_secure_port(address, credentials)
        await server.start()
    except RuntimeError as error:
        message = f"cannot listen on {address}"
        raise UnavailableError("address_in_use", message, "choose a free address in the configuration") from error
    return server, port


def caller_of(context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
    """Who calls; raises NotPermittedError when the certificate carries no identity."""
    (certificate,) = context.auth_context().get("x509_pem_cert", (b"",))
    return parse_identity(certificate)


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


@contextmanager
def translated(peer: str) -> Iterator[None]:
    """Within it, a failed call to `peer` raises its error of fleet.errors."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_call(error, peer) from error


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Checks the caller's role, maps errors to statuses and logs one canonical line for each call."""

    def __init__(self, roles: Mapping[str, frozenset[Role]]) -> None:
        self._roles = roles

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.split("/")[1]
        if handler is None or service in _OPEN_SERVICES:
            return handler
        roles = self._roles.get(handler_call_details.method.lstrip("/"), self._roles.get(service, frozenset()))
        return self._guard(handler, handler_call_details.method, roles)

    def _guard(self, handler: Any, method: str, roles: frozenset[Role]) -> Any:
        behaviours = {
            (False, False): (grpc.unary_unary_rpc_method_handler, _guard_unary, handler.unary_unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, _guard_stream, handler.unary_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, _guard_unary, handler.stream_unary),
            (True, True): (grpc.stream_stream_rpc_method_handler, _guard_stream, handler.stream_stream),
        }
        wrap, guard, behaviour = behaviours[handler.request_streaming, handler.response_streaming]
        return wrap(guard(behaviour, method, roles), handler.request_deserializer, handler.response_serializer)


def _guard_unary(behaviour: Any, method: str, roles: frozenset[Role]) -> Any:
    async def call(request: Any, context: Any) -> Any:
        with _Outcome(method) as outcome:
            outcome.identity = _admit(context, method, roles)
            return await behaviour(request, context)
        return await _abort(context, outcome.error)

    return call


def _guard_stream(behaviour: Any, method: str, roles: frozenset[Role]) -> Any:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        with _Outcome(method) as outcome:
            outcome.identity = _admit(context, method, roles)
            async for response in behaviour(request, context):
                yield response
        if outcome.error is not None:
            await _abort(context, outcome.error)

    return call


class _Outcome:
    """Notes how a call ended, logs it, and holds back errors that have a status of their own."""

    def __init__(self, method: str) -> None:
        self.identity: Identity | None = None
        self.error: BedplateError | None = None
        self._method = method
        self._started = time.monotonic()

    def __enter__(self) -> _Outcome:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> bool:
        if isinstance(error, Exception):
            self.error = error if isinstance(error, BedplateError) else _surprise(self._method, error)
        duration_ms = round((time.monotonic() - self._started) * 1000, 1)
        caller = f"{self.identity.role}:{self.identity.name}" if self.identity else ""
        outcome = self.error.code if self.error else "ok" if error is None else "cancelled"
        log.info("call.served", method=self._method, caller=caller, outcome=outcome, duration_ms=duration_ms)
        return self.error is not None


def _surprise(method: str, error: Exception) -> BedplateError:
    log.error("call.crashed", method=method, exc_info=error)
    return BedplateError("internal", "an unexpected error; the server's log has it", "report it with the server's log")


def _admit(context: Any, method: str, roles: frozenset[Role]) -> Identity:
    identity = caller_of(context)
    if identity.role not in roles:
        message = f"role {identity.role} may not call {method}"
        raise NotPermittedError(
            "role_not_permitted", message, f"use a certificate of role {' or '.join(sorted(roles))}"
        )
    return identity


async def _abort(context: Any, error: BedplateError | None) -> None:
    assert error is not None
    status = next((status for family, status in _STATUS if isinstance(error, family)), grpc.StatusCode.INTERNAL)
    detail = {"code": error.code, "field": getattr(error, "field", ""), "next_step": error.next_step}
    detail = {key: value[:ERROR_FIELD_CHARS_MAX] for key, value in detail.items()}
    message = error.message.encode("utf-8", "replace").decode()[:ERROR_MESSAGE_CHARS_MAX]
    await context.abort(
        status, message, ((ERROR_KEY, json.dumps(detail, ensure_ascii=False).encode("utf-8", "replace")),)
    )


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
