"""What is written to balances: placements set aside, meters are charged, once each. PURE.

A meter counts up for each placement of a sandbox, and so does what was charged of it: what is due is the difference, whichever
meters were seen, missed or seen twice. What was charged and the balances that it went to are written together or not at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fleet.model.assignment import Assignment
from fleet.model.budget import ROOT_ACCOUNT, Balance, Charged, MeterEntry, Prices
from fleet.model.ids import HostId, SandboxId
from fleet.model.sandbox import Amounts, Totals
from scheduler.budget.accounts import Account, is_kept, need_of, sandbox_of
from scheduler.budget.balance import add_amounts, as_it_must_be, subtract_amounts
from scheduler.placement.snapshot import Snapshot, accounts_of, amounts_of, set_aside

# Balances that one transaction changes; with their conditions half of what a transaction may hold.
BALANCES_MAX = 50
HOUR_MS = 3_600_000
GIB = 1024**3
# Counters and sums stay here: a host that says more is not believed, and what is written can be read (292 million years in ms).
COUNTER_MAX = 2**63 - 1

Placed = tuple[SandboxId, int]


class Books:
    """Balances as they shall be, over several changes that are written one after another."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._balances: dict[Account, Balance] = {}

    def balance(self, account: Account) -> Balance:
        """The balance with all that was posted."""
        return self._balances.get(account) or as_it_must_be(self._snapshot, account)

    def place(self, order: Assignment) -> tuple[Balance, ...]:
        """A placement that is not written yet: the balances of its accounts; a further run holds some of it already."""
        known = self._snapshot.assignments.get(order.sandbox_id)
        need, held, holders = need_of(order.spec.resources), Amounts(), frozenset[str]()
        if known is not None and known.host_id == order.host_id:
            held = amounts_of(known, set_aside(known, self._snapshot.status_of(known)))
            holders = frozenset(accounts_of(known))
        return tuple(
            self._reserve((order.tenant, name), subtract_amounts(need, held) if name in holders else need)
            for name in accounts_of(order)
        )

    def spend(self, account: Account, used: Totals) -> Balance:
        """So much was used."""
        known = self.balance(account)
        made = Balance(*account, known.reserved, add_totals(known.spent, used))
        self._balances[account] = made
        return made

    def _reserve(self, account: Account, growth: Amounts) -> Balance:
        known = self.balance(account)
        made = Balance(*account, add_amounts(known.reserved, growth), known.spent)
        self._balances[account] = made
        return made


@dataclass(frozen=True, slots=True)
class Posting:
    """What is written at once: how far a host's meter is charged, and the balances with what that comes to."""

    charged: Charged
    balances: tuple[Balance, ...]


def charge(snapshot: Snapshot, books: Books, host_id: HostId) -> Iterator[Posting]:
    """A host's meter, charged in one posting, or in several where too many accounts pay; the last one has the meter's period."""
    meter, known = snapshot.meters[host_id], snapshot.charged.get(host_id)
    done: dict[Placed, MeterEntry] = {_placed(entry): entry for entry in known.entries} if known is not None else {}
    metered = {_placed(entry): entry for entry in meter.entries}
    period = known.period if known is not None else 0
    balances: dict[Account, Balance] = {}
    for placed, entry in metered.items():
        before = done[placed].used if placed in done else Totals()
        due = due_of(entry.used, before, snapshot.prices)
        done[placed] = MeterEntry(
            entry.sandbox_id, entry.tenant, entry.placement, add_totals(before, due), entry.accounts
        )
        if due == Totals():
            continue
        for account in payers_of(snapshot, entry):
            balances[account] = books.spend(account, due)
        if len(balances) >= BALANCES_MAX:
            yield Posting(Charged(host_id, period, tuple(done.values())), tuple(balances.values()))
            balances = {}
    # What the meter has no more is charged, or its host would still tell it.
    kept = tuple(entry for placed, entry in done.items() if placed in metered)
    yield Posting(Charged(host_id, meter.period, kept), tuple(balances.values()))


def due_of(used: Totals, charged: Totals, prices: Prices) -> Totals:
    """What is used and not charged, with its price; a counter that went back owes nothing until it is past what was charged."""
    wall_ms, vcpu_ms = _top(used.wall_ms, charged.wall_ms), _top(used.vcpu_ms, charged.vcpu_ms)
    gpu_ms, egress_bytes = _top(used.gpu_ms, charged.gpu_ms), _top(used.egress_bytes, charged.egress_bytes)
    top = Totals(wall_ms, vcpu_ms, gpu_ms, egress_bytes)
    # Of whole counters, so that nothing is lost to rounding however often they are charged.
    cost_micro = price_of(top, prices) - price_of(charged, prices)
    return Totals(
        wall_ms - charged.wall_ms,
        vcpu_ms - charged.vcpu_ms,
        gpu_ms - charged.gpu_ms,
        egress_bytes - charged.egress_bytes,
        min(cost_micro, COUNTER_MAX),
    )


def _top(used: int, charged: int) -> int:
    return max(min(used, COUNTER_MAX), charged)


def price_of(used: Totals, prices: Prices) -> int:
    """What so much costs at these prices, in whole micro-units."""
    return (
        used.vcpu_ms * prices.vcpu_hour_micro // HOUR_MS
        + used.gpu_ms * prices.gpu_hour_micro // HOUR_MS
        + used.egress_bytes * prices.egress_gib_micro // GIB
    )


def payers_of(snapshot: Snapshot, entry: MeterEntry) -> Iterator[Account]:
    """The accounts that an entry is charged to; one that is removed meanwhile is left out, those above it pay."""
    for name in entry.accounts or (ROOT_ACCOUNT,):
        account = (entry.tenant, name)
        if is_kept(snapshot, account):
            yield account


def is_over(snapshot: Snapshot, account: Account) -> bool:
    """Whether nothing counts in an account any more, so that its balance may go."""
    is_there = sandbox_of(account[1]) in snapshot.opaque_sandboxes or is_kept(snapshot, account)
    return not is_there and account not in snapshot.sums.members


def add_totals(one: Totals, other: Totals) -> Totals:
    """Both together, and no more than COUNTER_MAX of anything."""
    return Totals(
        min(one.wall_ms + other.wall_ms, COUNTER_MAX),
        min(one.vcpu_ms + other.vcpu_ms, COUNTER_MAX),
        min(one.gpu_ms + other.gpu_ms, COUNTER_MAX),
        min(one.egress_bytes + other.egress_bytes, COUNTER_MAX),
        min(one.cost_micro + other.cost_micro, COUNTER_MAX),
    )


def spent_by(entries: Sequence[MeterEntry]) -> Totals:
    """What several placements have used together."""
    total = Totals()
    for entry in entries:
        total = add_totals(total, entry.used)
    return total


def _placed(entry: MeterEntry) -> Placed:
    return entry.sandbox_id, entry.placement
