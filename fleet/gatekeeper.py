"""Who may call what: every call of every server passes here first. What its table does not name is denied to everyone.

Also maps errors to gRPC statuses and logs one canonical line for each call.
"""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

import asyncio
import inspect
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from fleet.certificates import parse_identity
from fleet.errors import BedplateError, NotPermittedError, UnavailableError
from fleet.identity import Identity, Role
from fleet.model.ids import is_dns_label
from fleet.revocation import Revocations, revoked
from fleet.rpc import ERROR_KEY, STATUS

# The roles that may call each method, by its full name "package.Service/Method".
Permissions = Mapping[str, frozenset[Role]]

# Whether a server is well and what it serves says nothing about tenants: every role may ask.
EVERYONE = frozenset(Role)
OPEN_PERMISSIONS: Permissions = {
    f"{health.SERVICE_NAME}/Check": EVERYONE,
    f"{health.SERVICE_NAME}/List": EVERYONE,
    f"{health.SERVICE_NAME}/Watch": EVERYONE,
    f"{reflection.SERVICE_NAME}/ServerReflectionInfo": EVERYONE,
}

# For whom the scheduler calls a host, "tenant/lab": for the host's events, never for a decision.
ACTOR_KEY = "bedplate-actor"
# An error travels in HTTP/2 headers, of which a peer takes 8 KiB in all; percent-encoding makes up to 12 bytes of a character.
ERROR_MESSAGE_CHARS_MAX = 400
ERROR_FIELD_CHARS_MAX = 160

# One caller's calls under way, whatever they are: more than all that the services let it have, watches of a thousand sandboxes
# included. What has no bound of its own, as health and reflection, is within it.
CALLS_MAX = 2048
# Those who are many and need not be trusted; a scheduler calls a host for all of its tenants.
COUNTED_ROLES = frozenset({Role.TENANT, Role.OPERATOR})

log = structlog.get_logger()


def caller_of(context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
    """Who calls; raises NotPermittedError when the certificate carries no identity."""
    return parse_identity(certificate_of(context))


def certificate_of(context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    """The caller's certificate, PEM, as TLS has verified it; empty when there is none."""
    (certificate,) = context.auth_context().get("x509_pem_cert", (b"",))
    return bytes(certificate)


def actor_name(identity: Identity) -> str:
    """An identity as events name it: "tenant/lab"."""
    return f"{identity.role}/{identity.name}"


def actor_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """On whose behalf a call is made: the caller's own, or whom the scheduler names when it passes a call on."""
    caller = caller_of(context)
    if caller.role is Role.SCHEDULER:
        named = dict(context.invocation_metadata() or ()).get(ACTOR_KEY, "")
        role, _, name = str(named).partition("/")
        if role in (Role.OPERATOR, Role.TENANT) and is_dns_label(name):
            return str(named)
    return actor_name(caller)


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Checks the caller's role, maps errors to statuses and logs one canonical line for each call."""

    def __init__(
        self,
        permissions: Permissions,
        *,
        anonymous: frozenset[str] = frozenset(),
        revocations: Revocations | None = None,
    ) -> None:
        """`anonymous` are methods that ask for no certificate and check another proof themselves.

        Without `revocations` nobody is; with them, calls wait for the first that the store has said of them, health apart.
        """
        self._permissions = {**OPEN_PERMISSIONS, **permissions}
        self._anonymous = anonymous
        self._needs_revocations = revocations is not None
        self._revocations = revocations or Revocations()
        self._revocations.on_change(self._end_revoked)
        self._running: set[_Running] = set()
        self._calls: Counter[Identity] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        name = handler_call_details.method.lstrip("/")
        roles = None if name in self._anonymous else self._permissions.get(name, frozenset())
        return self._guard(handler, handler_call_details.method, roles)

    def _guard(self, handler: Any, method: str, roles: frozenset[Role] | None) -> Any:
        behaviours = {
            (False, False): (grpc.unary_unary_rpc_method_handler, _guard_unary, handler.unary_unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, _guard_stream, handler.unary_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, _guard_unary, handler.stream_unary),
            (True, True): (grpc.stream_stream_rpc_method_handler, _guard_stream, handler.stream_stream),
        }
        wrap, guard, behaviour = behaviours[handler.request_streaming, handler.response_streaming]
        return wrap(
            guard(behaviour, method, partial(self._admitted, method, roles)),
            handler.request_deserializer,
            handler.response_serializer,
        )

    @contextmanager
    def _admitted(self, method: str, roles: frozenset[Role] | None, context: Any, outcome: _Outcome) -> Iterator[None]:
        """A call that is let in; it ends when its certificate is revoked. Raises NotPermittedError for one that is not."""
        if roles is None:
            yield
            return
        outcome.identity = identity = _admit(context, method, roles)
        if self._calls[identity] >= CALLS_MAX and identity.role in COUNTED_ROLES:
            message = f"{identity.role} {identity.name} has {CALLS_MAX} calls under way, as many as it may"
            raise UnavailableError("calls_exhausted", message, "end some, then try again")
        certificate = certificate_of(context)
        if self._revocations.is_revoked(certificate):
            raise revoked()
        if self._needs_revocations and not self._revocations.is_known and method.lstrip("/") not in OPEN_PERMISSIONS:
            message = "which certificates are revoked is not known yet: the store has not answered"
            raise UnavailableError("store_unavailable", message, "try again; check etcd and the way to it")
        task = asyncio.current_task()
        assert task is not None
        running = _Running(certificate, task)
        self._running.add(running)
        self._calls[identity] += 1
        try:
            yield
        except asyncio.CancelledError:
            if not running.is_ended:
                raise
            task.uncancel()
            raise revoked() from None
        finally:
            self._running.discard(running)
            self._calls[identity] -= 1
            if not self._calls[identity]:
                del self._calls[identity]

    def _end_revoked(self) -> None:
        for running in tuple(self._running):
            if not running.is_ended and self._revocations.is_revoked(running.certificate):
                running.is_ended = True
                running.task.cancel()


def _guard_unary(behaviour: Any, method: str, admitted: Any) -> Any:
    async def call(request: Any, context: Any) -> Any:
        with _Outcome(method) as outcome, admitted(context, outcome):
            return await behaviour(request, context)
        return await _abort(context, outcome.error)

    return call


def _guard_stream(behaviour: Any, method: str, admitted: Any) -> Any:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        with _Outcome(method) as outcome, admitted(context, outcome):
            answer = behaviour(request, context)
            if inspect.isawaitable(answer):
                # It writes its responses itself, as the health service's Watch does.
                await answer
            else:
                async for response in answer:
                    yield response
        if outcome.error is not None:
            await _abort(context, outcome.error)

    return call


@dataclass(slots=True, eq=False)
class _Running:
    """A call under way, and whether it was ended because its certificate is revoked."""

    certificate: bytes
    task: asyncio.Task[Any]
    is_ended: bool = False


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
        message = f"role {identity.role} may not call {method.rpartition('/')[2]}"
        next_step = f"use a certificate of role {' or '.join(sorted(roles))}" if roles else "no role may call it"
        raise NotPermittedError("role_not_permitted", message, next_step)
    return identity


async def _abort(context: Any, error: BedplateError | None) -> None:
    assert error is not None
    status = next((status for family, status in STATUS if isinstance(error, family)), grpc.StatusCode.INTERNAL)
    detail = {"code": error.code, "field": getattr(error, "field", ""), "next_step": error.next_step}
    detail = {key: value[:ERROR_FIELD_CHARS_MAX] for key, value in detail.items()}
    message = error.message.encode("utf-8", "replace").decode()[:ERROR_MESSAGE_CHARS_MAX]
    await context.abort(
        status, message, ((ERROR_KEY, json.dumps(detail, ensure_ascii=False).encode("utf-8", "replace")),)
    )
