"""Says through the health service whether calls can be answered: not while the store is away."""

from grpc_health.v1 import health, health_pb2

from scheduler.state import FleetState

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthReport:
    """Keeps `servicer` true for `services` and for the server as a whole."""

    def __init__(self, state: FleetState, servicer: health.aio.HealthServicer, services: list[str]) -> None:
        self._state = state
        self._servicer = servicer
        self._services = (*services, health.OVERALL_HEALTH)

    async def run(self) -> None:
        """Reports until cancelled."""
        while True:
            changed, was_fresh = self._state.changed(), self._state.is_fresh
            for service in self._services:
                await self._servicer.set(service, _SERVING if was_fresh else _NOT_SERVING)
            while self._state.is_fresh == was_fresh:
                await changed.wait()
                changed = self._state.changed()
