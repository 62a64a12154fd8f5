"""The tree of accounts: whose budgets a sandbox counts in. PURE.

    the tenant's own "" <- named accounts, nested to ACCOUNTS_DEPTH_MAX <- a sandbox "~id" with limits <- its children's "~id" …

A chain is the way from a sandbox to the tenant's own account, the nearest first. An order carries its chain: what becomes of the
tree later counts for later placements.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fleet.model.budget import ROOT_ACCOUNT, Balance, Budget
from fleet.model.ids import NO_SANDBOX, SandboxId, Tenant
from fleet.model.sandbox import Amounts, Goal, Limits, Resources, SandboxRecord

Account = tuple[Tenant, str]

# Named accounts below one another, and sandboxes below one another: deeper than organisations are, and a placement still touches
# fewer keys than one transaction holds.
ACCOUNTS_DEPTH_MAX = 8
LINEAGE_MAX = 8
# One tenant's named accounts: a page of teams, not a database.
ACCOUNTS_MAX = 200
SANDBOX_PREFIX = "~"
DEVICE_MILLI = 1000
UNLIMITED = Limits()


class Seen(Protocol):
    """What the tree and its balances are read from; a Snapshot is one."""

    @property
    def budgets(self) -> Mapping[Account, Budget]: ...

    @property
    def balances(self) -> Mapping[Account, Balance]: ...

    @property
    def records(self) -> Mapping[SandboxId, SandboxRecord]: ...

    @property
    def reserved_by_account(self) -> Mapping[Account, Amounts]: ...


@dataclass(frozen=True, slots=True)
class Chain:
    """Who pays for one sandbox, the nearest first; `below` says how many generations below each account it is.

    With a `fault` it cannot be placed: a sentence saying which account or sandbox of its chain is not there.
    """

    tenant: Tenant
    accounts: tuple[str, ...]
    below: tuple[int, ...]
    fault: str = ""


def sandbox_account(sandbox_id: SandboxId) -> str:
    """The account of a sandbox and of all that it has started."""
    return SANDBOX_PREFIX + sandbox_id


def sandbox_of(account: str) -> SandboxId:
    """The sandbox whose account it is; NO_SANDBOX for another."""
    return SandboxId(account[1:]) if account.startswith(SANDBOX_PREFIX) else NO_SANDBOX


def chain_of(seen: Seen, record: SandboxRecord) -> Chain:
    """Who would pay for a sandbox that were placed now."""
    accounts: list[str] = []
    below: list[int] = []
    if record.spec.limits != UNLIMITED:
        accounts.append(sandbox_account(record.sandbox_id))
        below.append(0)
    named, fault = record.spec.budget, ""
    for distance, ancestor_id in enumerate(record.ancestors, 1):
        ancestor = seen.records.get(ancestor_id)
        if ancestor is None or ancestor.tenant != record.tenant or ancestor.goal is Goal.REMOVE:
            fault = fault or f"its ancestor, sandbox {ancestor_id}, is destroyed"
            continue
        named = ancestor.spec.budget
        if ancestor.spec.limits != UNLIMITED:
            accounts.append(sandbox_account(ancestor_id))
            below.append(distance)
    path, missing = path_of(seen.budgets, record.tenant, named)
    fault = fault or (f"account {missing} does not exist" if missing else "")
    accounts += path
    below += [len(record.ancestors) + 1] * len(path)
    return Chain(record.tenant, tuple(accounts), tuple(below), fault)


def path_of(budgets: Mapping[Account, Budget], tenant: Tenant, account: str) -> tuple[list[str], str]:
    """The named account and those above it, with the tenant's own last; and the first that does not exist, if one does not."""
    path: list[str] = []
    while account != ROOT_ACCOUNT:
        budget = budgets.get((tenant, account))
        if budget is None or account in path or len(path) >= ACCOUNTS_DEPTH_MAX:
            return [*path, ROOT_ACCOUNT], account
        path.append(account)
        account = budget.parent
    return [*path, ROOT_ACCOUNT], ""


def limits_of(seen: Seen, tenant: Tenant, account: str) -> Limits:
    """What an account may use; without limits where none are set."""
    sandbox_id = sandbox_of(account)
    if sandbox_id:
        record = seen.records.get(sandbox_id)
        return record.spec.limits if record is not None and record.tenant == tenant else UNLIMITED
    budget = seen.budgets.get((tenant, account))
    return budget.limits if budget is not None else UNLIMITED


def is_kept(seen: Seen, account: Account) -> bool:
    """Whether an account still is one: a tenant's own always, a named one until it is removed, a sandbox's with its record."""
    tenant, name = account
    sandbox_id = sandbox_of(name)
    if sandbox_id:
        record = seen.records.get(sandbox_id)
        return record is not None and record.tenant == tenant
    return name == ROOT_ACCOUNT or account in seen.budgets or account in seen.balances


def say_account(tenant: Tenant, account: str) -> str:
    """An account as people call it."""
    if account == ROOT_ACCOUNT:
        return f"tenant {tenant}"
    sandbox_id = sandbox_of(account)
    return f"sandbox {sandbox_id}" if sandbox_id else f"account {account}"


def need_of(resources: Resources) -> Amounts:
    """What one running sandbox counts for in budgets: what it asked for, without what its VMM needs beside."""
    gpu_milli = resources.gpus * (resources.gpu_milli or DEVICE_MILLI)
    return Amounts(resources.vcpus, resources.memory_mib, resources.disk_mib, gpu_milli, 1)
