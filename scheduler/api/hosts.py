"""HostService: the hosts, to operators; and which of them take no new sandboxes."""

from collections.abc import Callable
from typing import Any

from bedplate.host.v1 import service_pb2, service_pb2_grpc
from fleet.codec import encode, to_message
from fleet.errors import InvalidSpecError, NotFoundError
from fleet.gatekeeper import caller_of
from fleet.model.host import Drain, Host, HostCordon, Reservation
from fleet.model.ids import HostId
from fleet.store.keyspace import cordon_key
from fleet.store.port import Delete, Put, Store, Write
from scheduler.placement.drains import describe_drain
from scheduler.placement.snapshot import Snapshot
from scheduler.state import FleetState

# A sentence for whoever wonders why a host stands empty.
REASON_CHARS_MAX = 200
NAME_CHARS_SHOWN = 80
# What a drain may stop at once; each is a gap in somebody's work until another host has room.
MOVES_MAX = 100


class HostService(service_pb2_grpc.HostServiceServicer):
    """Lists what is registered, alive or not; cordons, drains and uncordons."""

    def __init__(self, store: Store, state: FleetState, now_ms: Callable[[], int]) -> None:
        self._store = store
        self._state = state
        self._now_ms = now_ms

    async def ListHosts(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 (the stub's names)
        """Every registered host by id, with what is set aside on it."""
        snapshot = self._state.fresh()
        return service_pb2.ListHostsResponse(hosts=[to_message(_view(snapshot, one)) for one in sorted(snapshot.hosts)])

    async def CordonHost(self, request: Any, context: Any) -> Any:  # noqa: N802
        """From now on nothing is placed on the host: a plan that was made before does not commit any more."""
        host_id = find_host(self._state.fresh(), request.host_id)
        cordon = HostCordon(host_id, caller_of(context).name, self._now_ms(), check_reason(request.reason))
        return await self._write(host_id, Put(cordon_key(host_id), encode(cordon)))

    async def DrainHost(self, request: Any, context: Any) -> Any:  # noqa: N802
        """From now on nothing is placed on the host, and what runs there goes elsewhere, so many at a time."""
        host_id = find_host(self._state.fresh(), request.host_id)
        cordon = HostCordon(
            host_id,
            caller_of(context).name,
            self._now_ms(),
            check_reason(request.reason),
            is_draining=True,
            moves_max=_check_moves(request.moves_max),
            is_forced=request.is_forced,
        )
        committed = await self._store.transact([], [Put(cordon_key(host_id), encode(cordon))])
        return to_message(_drain(await self._state.seen(committed.revision), host_id))

    async def GetDrain(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """How many sandboxes still run on the host, and why."""
        snapshot = self._state.fresh()
        return to_message(_drain(snapshot, find_host(snapshot, request.host_id)))

    async def UncordonHost(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """The host takes sandboxes again; one that was not cordoned stays as it is."""
        host_id = find_host(self._state.fresh(), request.host_id)
        return await self._write(host_id, Delete(cordon_key(host_id)))

    async def _write(self, host_id: HostId, write: Write) -> Any:
        committed = await self._store.transact([], [write])
        return to_message(_view(await self._state.seen(committed.revision), host_id))


def find_host(snapshot: Snapshot, named: str) -> HostId:
    """The registered host of that id; raises NotFoundError `host_unknown`."""
    host_id = HostId(named)
    if host_id not in snapshot.hosts:
        message = f"no host {named[:NAME_CHARS_SHOWN]!r} is registered"
        raise NotFoundError("host_unknown", message, "mb host ls shows those there are")
    return host_id


def check_reason(reason: str) -> str:
    """A reason in a line; raises InvalidSpecError `reason_invalid` for one that is longer or holds control characters."""
    if len(reason) > REASON_CHARS_MAX or not reason.isprintable():
        message = f"it is not one line of at most {REASON_CHARS_MAX} characters"
        raise InvalidSpecError("reason_invalid", message, "say it in a sentence", field="reason")
    return reason


def _check_moves(moves_max: int) -> int:
    if moves_max > MOVES_MAX:
        message = f"{moves_max} is more than {MOVES_MAX}"
        raise InvalidSpecError("moves_invalid", message, f"use 1 to {MOVES_MAX}", field="moves_max")
    return max(1, moves_max)


def _drain(snapshot: Snapshot, host_id: HostId) -> Drain:
    return Drain(_view(snapshot, host_id), *describe_drain(snapshot, host_id))


def _view(snapshot: Snapshot, host_id: HostId) -> Host:
    reserved = snapshot.reservations.get(host_id, Reservation(host_id))
    is_alive, cordon, losses = host_id in snapshot.alive, snapshot.cordons.get(host_id), snapshot.losses.get(host_id)
    return Host(snapshot.hosts[host_id], is_alive, reserved, cordon, losses)
