"""SecretService: passes values on to the host of a sandbox.

They are in this process's memory for the length of the call and nowhere else: no log, no error and no answer repeats one.
"""

from typing import Any

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.errors import InvalidSpecError
from fleet.gatekeeper import caller_of
from fleet.model.admission import QUOTED_CHARS_MAX, SECRET_BYTES_MAX, SECRETS_BYTES_MAX
from fleet.model.sandbox import SandboxSpec
from scheduler.api.access import find_sandbox
from scheduler.api.channels import HostChannels
from scheduler.api.execs import host_of
from scheduler.api.limits import WriteLimit
from scheduler.api.lookup import fresh_with
from scheduler.api.relay import CALL_S, calling, on_behalf_of
from scheduler.state import FleetState


class SecretService(service_pb2_grpc.SecretServiceServicer):
    """Relays values for the names that a spec lists."""

    def __init__(self, state: FleetState, channels: HostChannels, writes: WriteLimit) -> None:
        self._writes = writes
        self._state = state
        self._channels = channels

    async def SendSecrets(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's name)
        """Answers once the host has the values; sent again, they replace those it has not passed on yet."""
        self._writes.take(context)
        caller = caller_of(context)
        snapshot = await fresh_with(self._state, caller, request.sandbox, request.tenant)
        record = find_sandbox(snapshot, caller, request.sandbox, request.tenant)
        check_values(record.spec, [(secret.name, len(secret.value)) for secret in request.secrets])
        host_id = host_of(snapshot, record)
        stub = service_pb2_grpc.SecretServiceStub(self._channels.channel(snapshot, host_id))
        wanted = service_pb2.SendSecretsRequest(
            sandbox=record.sandbox_id, tenant=record.tenant, secrets=request.secrets
        )
        with calling(host_id):
            return await stub.SendSecrets(wanted, timeout=CALL_S, metadata=on_behalf_of(caller))


def check_values(spec: SandboxSpec, sizes: list[tuple[str, int]]) -> None:
    """Raises InvalidSpecError for a name that the spec does not list, one that comes twice, and values that are too large."""
    names = [name for name, _ in sizes]
    for index, (name, size_bytes) in enumerate(sizes):
        field = f"secrets[{index}]"
        if name not in spec.secrets:
            message = f"{name[:QUOTED_CHARS_MAX]!r} is no secret of sandbox {spec.name}"
            raise InvalidSpecError("secret_unknown", message, "send those that its jcard names", field=field)
        if name in names[:index]:
            raise InvalidSpecError("secret_doubled", f"{name} comes twice", "send each once", field=field)
        if size_bytes > SECRET_BYTES_MAX:
            message = f"{name} has {size_bytes} bytes, more than {SECRET_BYTES_MAX}"
            raise InvalidSpecError("secret_too_large", message, "bring large files as a source", field=field)
    if sum(size_bytes for _, size_bytes in sizes) > SECRETS_BYTES_MAX:
        message = f"together they have more than {SECRETS_BYTES_MAX} bytes"
        raise InvalidSpecError("secret_too_large", message, "bring large files as a source", field="secrets")
