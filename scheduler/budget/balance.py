"""What accounts have set aside: whether one more sandbox fits into the budgets of its whole chain. PURE.

The truth is the sum over all orders; what a balance in the store says is that sum as it was last written, and the fence of the
next placement. A ledger is one plan's view: what it takes is on top, and is undone with a mark.
"""

from collections.abc import Iterable, Iterator

from fleet.model.assignment import RefusalReason
from fleet.model.budget import Balance
from fleet.model.ids import Tenant
from fleet.model.sandbox import Amounts, SandboxRecord, Totals
from scheduler.budget.accounts import Account, Chain, Seen, chain_of, limits_of, say_account

BUDGET = "budget"
BUDGET_EXHAUSTED = "budget_exhausted"
NOTHING = Amounts()
# As users write them, and in which unit.
AMOUNT_WORDS = {
    "vcpus": ("vcpus", ""),
    "memory_mib": ("memory", " MiB"),
    "disk_mib": ("disk", " MiB"),
    "gpu_milli": ("gpus", " thousandths"),
    "sandboxes": ("sandboxes", ""),
    "depth": ("depth", ""),
}
TOTAL_WORDS = {
    "wall_ms": ("wall_clock", " ms"),
    "vcpu_ms": ("vcpu_time", " ms"),
    "gpu_ms": ("gpu_time", " ms"),
    "egress_bytes": ("egress", " bytes"),
    "cost_micro": ("cost", " millionths"),
}
_SUMMED = ("vcpus", "memory_mib", "disk_mib", "gpu_milli", "sandboxes")


class Ledger:
    """What every account has set aside, with what this plan takes."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._taken: dict[Account, Amounts] = {}
        self._log: list[tuple[Account, Amounts]] = []

    def chain(self, record: SandboxRecord) -> Chain:
        """Who pays for it."""
        return chain_of(self._seen, record)

    def reserved(self, account: Account) -> Amounts:
        """What the account, with all below it, has set aside."""
        known = self._seen.reserved_by_account.get(account, NOTHING)
        taken = self._taken.get(account)
        return add_amounts(known, taken) if taken is not None else known

    def fits(self, chain: Chain, growth: Amounts) -> RefusalReason | None:
        """None where `growth` more keeps every budget of the chain; else the reason, naming account, dimension, limit and use."""
        if chain.fault:
            return RefusalReason(BUDGET, 0, f"{chain.fault}; give it an account that is there: mb budget ls")
        for account, generation in zip(chain.accounts, chain.below, strict=True):
            limits = limits_of(self._seen, chain.tenant, account)
            spent = find_exhausted(limits.total, spent_of(self._seen, chain.tenant, account))
            if spent is not None:
                return RefusalReason(BUDGET, 0, say_exhausted(chain.tenant, account, *spent))
            if limits.concurrent == NOTHING:
                continue
            over = _find_over(limits.concurrent, self.reserved((chain.tenant, account)), growth, generation)
            if over is not None:
                return RefusalReason(BUDGET, 0, _say_over(say_account(chain.tenant, account), *over))
        return None

    def take(self, chain: Chain, growth: Amounts) -> None:
        """Sets `growth` aside in the whole chain."""
        self._shift(chain, growth)

    def give_back(self, chain: Chain, growth: Amounts) -> None:
        """Sets it aside no more."""
        self._shift(chain, subtract_amounts(NOTHING, growth))

    def mark(self) -> int:
        """A moment to return to."""
        return len(self._log)

    def rollback(self, mark: int) -> None:
        """Undoes what was taken and given back since `mark`."""
        while len(self._log) > mark:
            account, change = self._log.pop()
            self._taken[account] = subtract_amounts(self._taken[account], change)

    def _shift(self, chain: Chain, change: Amounts) -> None:
        for name in chain.accounts:
            account = (chain.tenant, name)
            self._taken[account] = add_amounts(self._taken.get(account, NOTHING), change)
            self._log.append((account, change))


def spent_of(seen: Seen, tenant: Tenant, account: str) -> Totals:
    """What an account, with all below it, has used so far."""
    balance = seen.balances.get((tenant, account))
    return balance.spent if balance is not None else Totals()


def find_exhausted(limit: Totals, used: Totals) -> tuple[str, int, int] | None:
    """The first dimension in which `used` has come to its limit: name, limit, use."""
    for name in TOTAL_WORDS:
        most, have = getattr(limit, name), getattr(used, name)
        if most and have >= most:
            return name, most, have
    return None


def say_exhausted(tenant: Tenant, account: str, name: str, limit: int, used: int) -> str:
    """An account that has nothing left in one dimension, and what would help."""
    word, unit = TOTAL_WORDS[name]
    return (
        f"{say_account(tenant, account)} has used {used}{unit} of {word}, and may use {limit}{unit}; raise that limit"
    )


def add_amounts(one: Amounts, other: Amounts) -> Amounts:
    """Both together."""
    return Amounts(
        one.vcpus + other.vcpus,
        one.memory_mib + other.memory_mib,
        one.disk_mib + other.disk_mib,
        one.gpu_milli + other.gpu_milli,
        one.sandboxes + other.sandboxes,
    )


def subtract_amounts(one: Amounts, other: Amounts) -> Amounts:
    """One without the other; below zero where that is more."""
    return Amounts(
        one.vcpus - other.vcpus,
        one.memory_mib - other.memory_mib,
        one.disk_mib - other.disk_mib,
        one.gpu_milli - other.gpu_milli,
        one.sandboxes - other.sandboxes,
    )


def unbalanced(seen: Seen, accounts: Iterable[Account]) -> Iterator[Account]:
    """Those whose balance does not say what is set aside in truth."""
    for account in accounts:
        balance = seen.balances.get(account)
        said = balance.reserved if balance is not None else NOTHING
        if said != seen.reserved_by_account.get(account, NOTHING):
            yield account


def as_it_must_be(seen: Seen, account: Account, spent: Totals | None = None) -> Balance:
    """The account's balance with what is set aside in truth, and with `spent` where that is another."""
    known = seen.balances.get(account)
    used = spent if spent is not None else known.spent if known is not None else Totals()
    return Balance(*account, seen.reserved_by_account.get(account, NOTHING), used)


def _find_over(limit: Amounts, reserved: Amounts, growth: Amounts, generation: int) -> tuple[str, int, int, int] | None:
    """The first dimension in which one more does not fit: name, limit, in use, wanted."""
    for name in _SUMMED:
        most, wanted = getattr(limit, name), getattr(growth, name)
        if most and wanted > 0 and getattr(reserved, name) + wanted > most:
            return name, most, getattr(reserved, name), wanted
    if limit.depth and generation > limit.depth:
        return "depth", limit.depth, generation, 0
    return None


def _say_over(who: str, name: str, limit: int, used: int, wanted: int) -> str:
    word, unit = AMOUNT_WORDS[name]
    if name == "depth":
        return (
            f"{who} may have {limit} generations of sandboxes below it, and this is one of number {used}; raise depth"
        )
    short = used + wanted - limit
    return f"{who} may use {limit}{unit} of {word}, uses {used}, and this needs {wanted}: stop what uses {short}, or raise it"
