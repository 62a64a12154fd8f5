"""HostService: the hosts, to operators."""

from typing import Any

from bedplate.host.v1 import service_pb2, service_pb2_grpc
from fleet.codec import to_message
from fleet.model.host import Host, Reservation
from scheduler.state import FleetState


class HostService(service_pb2_grpc.HostServiceServicer):
    """Lists what is registered, alive or not."""

    def __init__(self, state: FleetState) -> None:
        self._state = state

    async def ListHosts(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 (the stub's names)
        """Every registered host by id, with what is set aside on it."""
        snapshot = self._state.fresh()
        hosts = [
            Host(record, host_id in snapshot.alive, snapshot.reservations.get(host_id, Reservation(host_id)))
            for host_id, record in sorted(snapshot.hosts.items())
        ]
        return service_pb2.ListHostsResponse(hosts=[to_message(host) for host in hosts])
