"""What is asked of a scheduler about budgets: one method a call, every error one of fleet.errors."""

from __future__ import annotations  # grpc.aio classes are generic in their stubs only

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc

from bedplate.host.v1 import account_pb2, account_pb2_grpc
from fleet.codec import from_message, to_message
from fleet.errors import NotFoundError
from fleet.failover import open_failover
from fleet.identity import SCHEDULER_SERVER_NAME
from fleet.model.budget import Account, Prices
from fleet.model.sandbox import Limits
from fleet.rpc import translated
from mb.config import ClientConfig
from mb.limits import with_changes
from mb.live import CALL_TIMEOUT_S


class Books:
    """Calls about one tenant's accounts (empty: that of the certificate)."""

    def __init__(self, channel: grpc.aio.Channel, peer: str, tenant: str) -> None:
        self._peer = peer
        self._tenant = tenant
        # grpcio's generated stubs are typed for its synchronous twin.
        self._budgets: Any = account_pb2_grpc.BudgetServiceStub(channel)

    async def list_accounts(self, account: str | None = None) -> list[Account]:
        """Every account, or that one; raises NotFoundError `budget_unknown`."""
        request = account_pb2.ListBudgetsRequest(tenant=self._tenant)
        with translated(self._peer):
            reply = await self._budgets.ListBudgets(request, timeout=CALL_TIMEOUT_S)
        found = [from_message(Account, one) for one in reply.accounts]
        if account is None:
            return found
        named = [one for one in found if one.account == account]
        if not named:
            raise NotFoundError(
                "budget_unknown", f"there is no account {account!r}", "mb budget ls shows those there are"
            )
        return named

    async def get_account(self, account: str) -> Account:
        """One account; raises NotFoundError `budget_unknown`."""
        return (await self.list_accounts(account))[0]

    async def change_account(self, account: str, parent: str, changes: Mapping[str, int]) -> Account:
        """The account with some limits set; made where it is new."""
        known = next((one for one in await self.list_accounts() if one.account == account), None)
        limits = with_changes(known.limits if known is not None else Limits(), changes)
        request = account_pb2.SetBudgetRequest(
            tenant=self._tenant, account=account, parent=parent, limits=to_message(limits)
        )
        with translated(self._peer):
            return from_message(Account, await self._budgets.SetBudget(request, timeout=CALL_TIMEOUT_S))

    async def remove_account(self, account: str) -> None:
        """It is no account any more."""
        request = account_pb2.RemoveBudgetRequest(tenant=self._tenant, account=account)
        with translated(self._peer):
            await self._budgets.RemoveBudget(request, timeout=CALL_TIMEOUT_S)

    async def change_prices(self, changes: Mapping[str, int]) -> Prices:
        """The prices, with some set where there are changes."""
        with translated(self._peer):
            reply = await self._budgets.GetPrices(account_pb2.GetPricesRequest(), timeout=CALL_TIMEOUT_S)
            prices = from_message(Prices, reply)
            if changes:
                request = account_pb2.SetPricesRequest(prices=to_message(replace(prices, **changes)))
                prices = from_message(Prices, await self._budgets.SetPrices(request, timeout=CALL_TIMEOUT_S))
        return prices


@asynccontextmanager
async def open_books(config: ClientConfig) -> AsyncIterator[Books]:
    """Calls to the configured schedulers; nothing is sent before the first."""
    async with open_failover(config.addresses, config.tls, SCHEDULER_SERVER_NAME, ()) as channel:
        yield Books(channel, config.peer, config.tenant)
