"""How programs call each other: gRPC over mutual TLS, and one mapping of errors to statuses and back. Servers are fleet.server's.

An error travels as a gRPC status plus one trailing metadata entry, ERROR_KEY, that holds JSON: `code`, `field`, `next_step`.
"""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import grpc

from fleet.errors import (
    BedplateError,
    ConflictError,
    ExhaustedError,
    HostFaultError,
    InvalidSpecError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
)
from fleet.identity import KeyPair

# The largest message of the API: a chunk of 256 KiB, or a listing of some thousand sandboxes.
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
CHUNK_BYTES = 256 * 1024
KEEPALIVE_MS = 20_000
# A peer that is back is found within this time; left alone, gRPC waits up to two minutes after a long absence (measured: 25 s
# after 90 s).
RECONNECT_MS_MAX = 2_000
# A status that gRPC has received is handed out within one round of the event loop.
STATUS_WAIT_S = 1.0

OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS // 2),
    # What a ping waits for its answer, a minute as it comes; the time above is only TCP's (measured with 1.85 on a stopped peer).
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
    # A proxy in the environment must never see fleet traffic.
    ("grpc.enable_http_proxy", 0),
)

ERROR_KEY = "bedplate-error-bin"

STATUS = (
    (InvalidSpecError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotPermittedError, grpc.StatusCode.PERMISSION_DENIED),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (ConflictError, grpc.StatusCode.ALREADY_EXISTS),
    (ExhaustedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (HostFaultError, grpc.StatusCode.FAILED_PRECONDITION),
)

_FAMILIES: dict[grpc.StatusCode, type[BedplateError]] = {status: family for family, status in STATUS}


class TlsPair(Protocol):
    """Where a program's certificate comes from: its files, or what keeps up with them."""

    def load(self) -> tuple[bytes, KeyPair]:
        """The authority's certificate and the program's own pair, as they are now."""


class CallFailed(Protocol):
    """What grpc and grpc.aio errors have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def channel_credentials(tls: TlsPair) -> grpc.ChannelCredentials:
    """Client credentials: trusts the authority only, shows the program's certificate."""
    ca, pair = tls.load()
    return grpc.ssl_channel_credentials(ca, pair.key, pair.certificate)


def channel_options(server_name: str) -> list[tuple[str, Any]]:
    """Options of every channel; the server must prove `server_name`, whatever its address is."""
    return [*OPTIONS, ("grpc.ssl_target_name_override", server_name)]


def open_channel(address: str, tls: TlsPair, server_name: str) -> grpc.aio.Channel:
    """A channel to the peer at `address` ("ip:port"), under the certificate as it is now."""
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=channel_options(server_name))


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


def error_from_result(status: str, message: str, detail: Mapping[str, str]) -> BedplateError:
    """The error of fleet.errors that one of many answers stands for, by the name of its gRPC status."""
    family = next((family for code, family in _FAMILIES.items() if code.name == status), BedplateError)
    return _rebuild(family, message, detail)


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


def code_of_ended(call: Any) -> grpc.StatusCode | None:
    """The status of a call that has ended, for callbacks of its end."""
    code: grpc.StatusCode | None = _at_once(call.code())
    return code


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


def _rebuild(family: type[BedplateError], message: str, detail: Mapping[str, str]) -> BedplateError:
    code, field, next_step = (str(detail.get(name, "")) for name in ("code", "field", "next_step"))
    if family is InvalidSpecError and field:
        return InvalidSpecError(code, message.removeprefix(f"{field}: "), next_step, field=field)
    return family(code, message, next_step)
