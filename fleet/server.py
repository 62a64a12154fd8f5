"""How programs serve: gRPC over mutual TLS, with one gatekeeper (fleet.gatekeeper) before every call."""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fleet.credentials import LiveCredentials
from fleet.errors import UnavailableError
from fleet.gatekeeper import Gatekeeper, Permissions
from fleet.identity import TlsFiles
from fleet.revocation import Revocations
from fleet.rpc import OPTIONS

# What a server takes in one message: a chunk, or a spec far past what admission lets through. Decoding holds the event loop.
REQUEST_BYTES_MAX = 1024 * 1024
# What strangers may send, and how much of it at once: a request for a certificate, from a rack that is set up together.
OPEN_REQUEST_BYTES_MAX = 16 * 1024
OPEN_STREAMS_MAX, OPEN_CALLS_MAX = 4, 64
# An enrolment takes a second; who holds a connection longer, or does not get through the handshake, is let go.
OPEN_CONNECTION_MS_MAX, OPEN_HANDSHAKE_MS_MAX = 60_000, 10_000
STOP_GRACE_S = 5.0

_OPEN_OPTIONS = (
    ("grpc.max_concurrent_streams", OPEN_STREAMS_MAX),
    ("grpc.max_connection_age_ms", OPEN_CONNECTION_MS_MAX),
    ("grpc.max_connection_age_grace_ms", OPEN_HANDSHAKE_MS_MAX),
    ("grpc.server_handshake_timeout_ms", OPEN_HANDSHAKE_MS_MAX),
)


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
    return [receive, *(option for option in OPTIONS if option[0] != receive[0]), ("grpc.so_reuseport", 0)]


async def _listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    try:
        port = server.add_secure_port(address, credentials)
        await server.start()
    except RuntimeError as error:
        message = f"cannot listen on {address}"
        raise UnavailableError("address_in_use", message, "choose a free address in the configuration") from error
    return int(port)
