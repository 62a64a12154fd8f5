"""Every method of every service, from the descriptors, and every kind of caller there is."""

import asyncio
import datetime
import importlib
import pkgutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

import bedplate
from fleet.certificates import create_authority, issue_certificate
from fleet.errors import BedplateError
from fleet.identity import Identity, KeyPair, Role, TlsFiles
from fleet.rpc import open_channel, translated

# A stream that is admitted and has nothing to say is waited for no longer; a refusal is always said at once.
LISTEN_S = 2.0
CALL_S = 20.0
# Who may be at the other end: each role, a certificate of the authority without one, one of another authority.
NOBODY, FOREIGN = "nobody", "foreign"
CALLERS = (*Role, NOBODY, FOREIGN)
# How a caller is turned away.
DENIALS = {NOBODY: "no_identity", FOREIGN: "unreachable"}
DENIED = "role_not_permitted"
UNSERVED = "call_unimplemented"


def every_method() -> dict[str, MethodDescriptor]:
    """All methods of all services of proto/, by full name: "package.Service/Method"."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(bedplate.__path__, "bedplate.")
        if module.name.endswith("_pb2")
    ]
    services = [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    return {f"{service.full_name}/{method.name}": method for service in services for method in service.methods}


def request_of(method: MethodDescriptor, **values: str) -> Message:
    """A request with `values` wherever a field of that name is, at any depth of single messages."""
    message = message_factory.GetMessageClass(method.input_type)()
    _fill(message, values)
    return message


def has_field(kind: Descriptor, name: str) -> bool:
    """Whether a request names this anywhere."""
    return any(
        field.name == name or (_is_single_message(field) and has_field(field.message_type, name))
        for field in kind.fields
    )


async def outcome_of(channel: grpc.aio.Channel, method: MethodDescriptor, request: Message) -> tuple[str, Any]:
    """The code with which a call ends, "ok" for an answer, "waits" when it was admitted and is silent; and the answer."""
    try:
        async with asyncio.timeout(CALL_S):
            with translated("server"):
                return await _call(channel, method, request)
    except BedplateError as error:
        return error.code, None


@dataclass(frozen=True)
class Callers:
    """Certificates of every kind, below `folder`."""

    folder: Path
    authority: KeyPair

    def tls(self, caller: str, name: str) -> TlsFiles:
        """The files of a caller of that kind."""
        now = datetime.datetime.now(datetime.UTC)
        authority = create_authority(now) if caller == FOREIGN else self.authority
        role: Any = {NOBODY: NOBODY, FOREIGN: Role.OPERATOR}.get(caller, caller)
        pair = issue_certificate(authority, Identity(role, name), now)
        files = TlsFiles(*(self.folder / f"{caller}-{name}.{suffix}" for suffix in ("ca", "crt", "key")))
        for path, content in zip(
            (files.ca, files.certificate, files.key),
            (self.authority.certificate, pair.certificate, pair.key),
            strict=True,
        ):
            path.write_bytes(content)
        return files


async def admitted(
    address: str, server_name: str, callers: Callers, names: Callable[[str], str]
) -> dict[str, set[str]]:
    """By method, the callers that a server lets in; a method that it does not serve has none.

    Raises AssertionError when a caller is turned away otherwise than it should be.
    """
    found: dict[str, set[str]] = {}
    for caller in CALLERS:
        async with open_channel(address, callers.tls(caller, names(caller)), server_name) as channel:
            for name, method in every_method().items():
                code, _ = await outcome_of(channel, method, request_of(method))
                found.setdefault(name, set())
                if code in (UNSERVED, DENIALS.get(caller, DENIED)):
                    continue
                assert caller in set(Role), f"{caller} was not turned away from {name}: {code}"
                found[name].add(caller)
    return found


def _fill(message: Message, values: dict[str, str]) -> None:
    for field in message.DESCRIPTOR.fields:
        if field.name in values and field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            setattr(message, field.name, values[field.name])
        elif _is_single_message(field) and any(has_field(field.message_type, name) for name in values):
            _fill(getattr(message, field.name), values)


def _is_single_message(field: FieldDescriptor) -> bool:
    return field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated


async def _call(channel: grpc.aio.Channel, method: MethodDescriptor, request: Message) -> tuple[str, Any]:
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    open_call: Any = kinds[method.client_streaming, method.server_streaming](
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    call = open_call(_once(request) if method.client_streaming else request, timeout=CALL_S)
    if not method.server_streaming:
        return "ok", await call
    try:
        async with asyncio.timeout(LISTEN_S):
            answer = await call.read()
    except TimeoutError:
        call.cancel()
        return "waits", None
    if answer is grpc.aio.EOF:
        return "ok", None
    call.cancel()
    return "ok", answer


async def _once(request: Message) -> AsyncIterator[Message]:
    yield request
