"""A plan's view of budgets: whether one more sandbox may be placed, whoever has room for it. PURE."""

from collections.abc import Sequence

from fleet.model.assignment import Assignment, RefusalReason
from fleet.model.sandbox import Amounts
from scheduler.budget.accounts import Chain, need_of
from scheduler.budget.balance import BUDGET, Ledger
from scheduler.placement.snapshot import Snapshot, accounts_of, amounts_of, set_aside
from scheduler.placement.wishes import Ask

# A group is one transaction: so many conditions come with each member beside its accounts (scheduler/commit.py), of so many.
GROUP_KEYS, KEYS_MAX = 6, 118


class Purse:
    """What the accounts have left within one plan; what a further run holds already is its own."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._ledger = Ledger(snapshot)

    def refuse(self, ask: Ask) -> RefusalReason | None:
        """Why its budgets do not let it be placed now; None where they do."""
        mark = self._ledger.mark()
        self._give_up(ask.known)
        reason = self._ledger.fits(self._ledger.chain(ask.record), need_of(ask.record.spec.resources))
        self._ledger.rollback(mark)
        return reason

    def refuse_any(self, asks: Sequence[Ask]) -> RefusalReason | None:
        """Why their budgets do not let all of them be placed together; None where they do."""
        payers = {account for ask in asks for account in self._ledger.chain(ask.record).accounts}
        if GROUP_KEYS * len(asks) + len(payers) > KEYS_MAX:
            text = f"its {len(asks)} members have {len(payers)} accounts together, more than are changed at once"
            return RefusalReason(BUDGET, 0, f"{text}; give fewer of them limits of their own")
        mark = self._ledger.mark()
        try:
            for ask in asks:
                reason = self.refuse(ask)
                if reason is not None:
                    return reason
                self.take(ask)
            return None
        finally:
            self._ledger.rollback(mark)

    def take(self, ask: Ask) -> tuple[str, ...]:
        """It is placed; the accounts that pay."""
        self._give_up(ask.known)
        chain = self._ledger.chain(ask.record)
        self._ledger.take(chain, need_of(ask.record.spec.resources))
        return chain.accounts

    def _give_up(self, known: Assignment | None) -> None:
        if known is not None:
            accounts = accounts_of(known)
            chain = Chain(known.tenant, accounts, (0,) * len(accounts))
            self._ledger.give_back(chain, held_amounts(self._snapshot, known))


def held_amounts(snapshot: Snapshot, assignment: Assignment) -> Amounts:
    """What an order counts for in its budgets now."""
    return amounts_of(assignment, set_aside(assignment, snapshot.status_of(assignment)))
