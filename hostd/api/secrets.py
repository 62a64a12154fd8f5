"""Takes the values of secrets in: they stand in memory until their guest has them. The scheduler has authorised the caller."""

from typing import Any

from bedplate.sandbox.v1 import service_pb2, service_pb2_grpc
from fleet.gatekeeper import actor_of
from hostd.api.lookup import find_order
from hostd.orders import Orders
from hostd.reconcile.session import Sessions


class SecretService(service_pb2_grpc.SecretServiceServicer):
    """Values for the guests of this host. Nothing of a request is ever logged."""

    def __init__(self, orders: Orders, sessions: Sessions) -> None:
        self._orders = orders
        self._sessions = sessions

    async def SendSecrets(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's name)
        """Holds all values of a sandbox's run; safe to repeat, also when the guest has them already."""
        order = find_order(self._orders, request.sandbox, request.tenant)
        values = [(secret.name, secret.value) for secret in request.secrets]
        await self._sessions.take_secrets(order, values, actor_of(context))
        return service_pb2.SendSecretsResponse()
