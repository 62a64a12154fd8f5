"""BudgetService: accounts with what they use, to their tenant; limits and prices, to whom may set them."""

from collections.abc import Callable, Iterator
from typing import Any

from bedplate.host.v1 import account_pb2, account_pb2_grpc
from fleet.codec import encode, from_message, to_message
from fleet.errors import ConflictError, InvalidSpecError, NotFoundError, NotPermittedError
from fleet.gatekeeper import caller_of
from fleet.identity import Identity, Role
from fleet.model.admission import LIMIT_MAX
from fleet.model.budget import ROOT_ACCOUNT, Account, Budget, Prices, Shortage
from fleet.model.ids import Tenant, is_dns_label
from fleet.model.sandbox import Limits
from fleet.store.keyspace import PRICES, balance_key, budget_key
from fleet.store.port import Delete, Put, Store
from scheduler.api.access import tenant_of
from scheduler.api.limits import WriteLimit
from scheduler.budget.accounts import ACCOUNTS_DEPTH_MAX, ACCOUNTS_MAX, limits_of, path_of, sandbox_of
from scheduler.budget.balance import spent_of
from scheduler.budget.forecast import Readings, left_s
from scheduler.commit import unmoved
from scheduler.placement.snapshot import Snapshot
from scheduler.state import FleetState

QUOTED_CHARS_MAX = 80


class BudgetService(account_pb2_grpc.BudgetServiceServicer):
    """Writes budgets and prices; balances are the cycle's."""

    def __init__(self, store: Store, state: FleetState, now_ms: Callable[[], int], writes: WriteLimit) -> None:
        self._store = store
        self._state = state
        self._now_ms = now_ms
        self._writes = writes

    async def ListBudgets(self, request: Any, context: Any) -> Any:  # noqa: N802 (the stub's names)
        """The tenant's own account, its named ones, and those of sandboxes that have limits."""
        tenant = tenant_of(caller_of(context), request.tenant)
        accounts = accounts_of_tenant(self._state.fresh(), tenant, self._now_ms())
        return account_pb2.ListBudgetsResponse(accounts=[to_message(one) for one in accounts])

    async def SetBudget(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Sets all limits of an account, and makes it where it is new; a tenant's own is the operators'."""
        self._writes.take(context)
        caller = caller_of(context)
        tenant, account = tenant_of(caller, request.tenant), request.account
        snapshot = self._state.fresh()
        known = snapshot.budgets.get((tenant, account))
        _check_account(caller, account)
        parent = known.parent if known is not None else request.parent
        if known is None:
            check_place(snapshot, tenant, account, parent)
        elif request.parent not in (ROOT_ACCOUNT, known.parent):
            message = f"account {account} lies below {known.parent or 'the tenant itself'}, and stays there"
            raise ConflictError("account_placed", message, "make another account, with the parent that you want")
        limits = check_limits(from_message(Limits, request.limits))
        made = Budget(tenant, account, parent, limits, caller.name, self._now_ms())
        keys = [budget_key(tenant, one) for one in dict.fromkeys((account, parent))]
        committed = await self._store.transact(unmoved(snapshot, *keys), [Put(keys[0], encode(made))])
        if not committed.is_committed:
            raise ConflictError("budget_moved", f"account {account} is changed by others too", "look, then try again")
        snapshot = await self._state.seen(committed.revision)
        return to_message(describe(snapshot, Readings(snapshot), (tenant, account), self._now_ms()))

    async def RemoveBudget(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A named account goes with what it has used, which stays with those above it; nothing may count in it any more."""
        self._writes.take(context)
        caller = caller_of(context)
        tenant, account = tenant_of(caller, request.tenant), request.account
        _check_account(caller, account)
        snapshot = self._state.fresh()
        if (tenant, account) not in snapshot.budgets:
            raise _unknown(tenant, account)
        _check_idle(snapshot, tenant, account)
        keys = (budget_key(tenant, account), balance_key(tenant, account))
        gone = keys if account != ROOT_ACCOUNT else keys[:1]
        committed = await self._store.transact(unmoved(snapshot, *keys), [Delete(key) for key in gone])
        if not committed.is_committed:
            raise ConflictError("budget_moved", f"account {account} is changed by others too", "look, then try again")
        await self._state.seen(committed.revision)
        return account_pb2.RemoveBudgetResponse()

    async def GetPrices(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """What a unit costs."""
        return to_message(self._state.fresh().prices)

    async def SetPrices(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """From now on a unit costs this; what is charged stays as it is."""
        prices = from_message(Prices, request.prices)
        for name in ("vcpu_hour_micro", "gpu_hour_micro", "egress_gib_micro"):
            _check_range(name, getattr(prices, name))
        committed = await self._store.transact([], [Put(PRICES, encode(prices))])
        return to_message((await self._state.seen(committed.revision)).prices)


def accounts_of_tenant(snapshot: Snapshot, tenant: Tenant, now_ms: int) -> Iterator[Account]:
    """The tenant's own account, then each named one below its parent, then sandboxes'."""
    readings = Readings(snapshot)
    children: dict[str, list[str]] = {}
    for budget in snapshot.budgets.values():
        if budget.tenant == tenant and budget.account != ROOT_ACCOUNT:
            children.setdefault(budget.parent, []).append(budget.account)

    def walk(account: str) -> Iterator[str]:
        yield account
        for child in sorted(children.get(account, ())):
            yield from walk(child)

    sandboxes = {
        name for owner, name in (*snapshot.balances, *snapshot.sums.limited) if owner == tenant and sandbox_of(name)
    }
    for name in (*walk(ROOT_ACCOUNT), *sorted(sandboxes)):
        yield describe(snapshot, readings, (tenant, name), now_ms)


def describe(snapshot: Snapshot, readings: Readings, account: tuple[Tenant, str], now_ms: int) -> Account:
    """One account with what it uses, and when what it has left runs out."""
    tenant, name = account
    budget, limits, use = snapshot.budgets.get(account), limits_of(snapshot, *account), readings.use_of(account, now_ms)
    shortages = sorted((round(in_s), dimension) for dimension, in_s in left_s(limits.total, use).items())
    return Account(
        tenant=tenant,
        account=name,
        parent=budget.parent if budget is not None else ROOT_ACCOUNT,
        limits=limits,
        reserved=snapshot.reserved_by_account.get(account, Limits().concurrent),
        spent=spent_of(snapshot, *account),
        use=use.used,
        hourly=use.hourly,
        by=budget.by if budget is not None else "",
        at_ms=budget.at_ms if budget is not None else 0,
        shortages=tuple(Shortage(dimension, in_s) for in_s, dimension in shortages),
    )


def check_place(snapshot: Snapshot, tenant: Tenant, account: str, parent: str) -> None:
    """Raises InvalidSpecError for a new account that cannot lie below `parent`, or is one too many."""
    if account == ROOT_ACCOUNT:
        if parent != ROOT_ACCOUNT:
            message = "the tenant's own account lies below no other"
            raise InvalidSpecError("parent_invalid", message, "leave the parent out", field="parent")
        return
    path, missing = path_of(snapshot.budgets, tenant, parent)
    if missing:
        raise _unknown(tenant, missing)
    if len(path) > ACCOUNTS_DEPTH_MAX - 1:
        message = f"it would lie more than {ACCOUNTS_DEPTH_MAX} accounts deep"
        raise InvalidSpecError("account_too_deep", message, "put it below a higher account", field="parent")
    if sum(1 for owner, name in snapshot.budgets if owner == tenant and name) >= ACCOUNTS_MAX:
        message = f"tenant {tenant} has {ACCOUNTS_MAX} accounts, as many as it may"
        raise InvalidSpecError("accounts_exhausted", message, "remove one: mb budget rm NAME", field="account")


def check_limits(limits: Limits) -> Limits:
    """The limits; raises InvalidSpecError for one that is no number from 0 on, or past LIMIT_MAX."""
    for part, values in (("concurrent", limits.concurrent), ("total", limits.total)):
        for name in values.__slots__:
            _check_range(f"limits.{part}.{name}", getattr(values, name))
    return limits


def _check_range(field: str, value: int) -> None:
    if not 0 <= value <= LIMIT_MAX:
        raise InvalidSpecError(
            "limit_invalid", f"{value} is not between 0 and {LIMIT_MAX}", "0 means none", field=field
        )


def _check_account(caller: Identity, account: str) -> None:
    if account == ROOT_ACCOUNT:
        if caller.role is not Role.OPERATOR:
            message = "a tenant's own account is its operators' to set"
            raise NotPermittedError("account_not_permitted", message, "name an account of yours, or ask an operator")
    elif not is_dns_label(account):
        message = f"{account[:QUOTED_CHARS_MAX]!r} is no account's name"
        raise InvalidSpecError("account_invalid", message, "use 1 to 63 characters of a-z, 0-9 and -", field="account")


def _check_idle(snapshot: Snapshot, tenant: Tenant, account: str) -> None:
    if account == ROOT_ACCOUNT:
        return
    below = sorted(one.account for one in snapshot.budgets.values() if (one.tenant, one.parent) == (tenant, account))
    if below:
        raise ConflictError(
            "account_in_use", f"account {below[0]} lies below {account}", f"mb budget rm {below[0]} first"
        )
    named = (one for one in snapshot.records.values() if (one.tenant, one.spec.budget) == (tenant, account))
    user = min((one.spec.name for one in named), default="")
    if user or snapshot.sums.members.get((tenant, account)):
        message = f"sandbox {user or 'of an earlier placement'} counts in account {account}"
        raise ConflictError("account_in_use", message, f"mb destroy {user or 'it'} first")


def _unknown(tenant: Tenant, account: str) -> NotFoundError:
    message = f"tenant {tenant} has no account {account[:QUOTED_CHARS_MAX]!r}"
    return NotFoundError("budget_unknown", message, "mb budget ls shows those there are")
