"""The cycle's step that keeps balances true: releases and repairs, hosts' meters charged once, and what is used up stopped.

balance     balance unmoved                 -> balance with what is set aside in truth; none, where nothing counts in it
charge      charged, balances unmoved       -> charged, balances
stop        record, order, what the host
            has said unmoved                -> record STOP with its reason, an event
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fleet.codec import encode
from fleet.model.assignment import Assignment
from fleet.model.budget import Balance
from fleet.model.sandbox import ENDED_PHASES, Goal, Reason, SandboxRecord, Totals
from fleet.store.keyspace import assignment_key, balance_key, charged_key, record_key, status_key
from fleet.store.port import Delete, Put
from scheduler import events
from scheduler.budget.accounts import Account, limits_of
from scheduler.budget.balance import BUDGET_EXHAUSTED, say_exhausted
from scheduler.budget.forecast import Exhaustion, Readings, find_exhaustion, left_s
from scheduler.budget.journal import Books, Posting, charge, is_over
from scheduler.commit import Change, unmoved
from scheduler.placement.snapshot import Snapshot
from scheduler.steps import Look, Step

# What a rate says may be off by a start or two meanwhile: half the time that is left is waited, within these bounds. The shortest
# keeps a hundred accounts near their end from filling the loop; the longest is well within the 5 s of the promise.
CHECK_S_MIN, CHECK_S_MAX = 0.25, 2.0
# Charges, and balances, that one pass writes: some ten transactions; the rest is due in the next.
POSTINGS_MAX = 500


class Charges(Step):
    """Charges and enforces; `rest_s` says how soon something may be used up."""

    name = "budget"

    def __init__(self) -> None:
        self._rest_s = math.inf
        self._next_ms = 0

    def rest_s(self) -> float:
        """For how long nothing can be used up."""
        return self._rest_s

    def due(self, look: Look) -> Sequence[Change]:
        """Balances, charges and stops."""
        snapshot = look.snapshot
        changes = list(balance_changes(snapshot))[:POSTINGS_MAX]
        if changes:
            # What is charged goes on top of them, in the next pass.
            return changes
        changes = list(charge_changes(snapshot))
        if changes:
            return changes
        # A burst of looks asks no oftener than something may be used up. A clock that was set back asks at once.
        if 0 <= self._next_ms - look.now_ms <= CHECK_S_MAX * 1000 and self._next_ms != look.now_ms:
            return ()
        found, self._rest_s = find_exhausted_accounts(snapshot, look.now_ms)
        changes = list(stop_changes(snapshot, found, look.now_ms))
        if not changes:
            self._next_ms = look.now_ms + int(min(self._rest_s, CHECK_S_MAX) * 1000)
        return changes


def balance_changes(snapshot: Snapshot) -> Iterator[Change]:
    """Balances that are not the sums they must be, and those of accounts that are gone."""
    if snapshot.opaque_hosts:
        # An order that cannot be read may hold what its accounts say.
        return
    books = Books(snapshot)
    for account in sorted(snapshot.sums.unbalanced):
        key = balance_key(*account)
        yield Change(unmoved(snapshot, key), (Put(key, encode(books.balance(account))),))
    for account in sorted(snapshot.sums.lapsed - snapshot.sums.unbalanced):
        if is_over(snapshot, account):
            key = balance_key(*account)
            yield Change(unmoved(snapshot, key), (Delete(key),))


def charge_changes(snapshot: Snapshot) -> Iterator[Change]:
    """What hosts have metered and is not charged."""
    books, postings = Books(snapshot), 0
    for host_id in sorted(snapshot.sums.uncharged):
        if postings >= POSTINGS_MAX:
            return
        for posting in charge(snapshot, books, host_id):
            postings += 1 + len(posting.balances)
            yield _post(snapshot, posting)


def find_exhausted_accounts(snapshot: Snapshot, now_ms: int) -> tuple[list[Exhaustion], float]:
    """The accounts that have used up something by estimate, and how long to wait with the next look."""
    readings, rest_s, found = Readings(snapshot), math.inf, []
    named = (account for account in snapshot.budgets if has_total(snapshot, account))
    for account in sorted({*named, *snapshot.sums.limited}):
        if account not in snapshot.sums.members:
            continue
        exhaustion = find_exhaustion(snapshot, readings, account, now_ms)
        if exhaustion is not None:
            found.append(exhaustion)
            continue
        left = left_s(limits_of(snapshot, *account).total, readings.use_of(account, now_ms))
        soonest = min(left.values(), default=CHECK_S_MAX * 2)
        rest_s = min(rest_s, max(CHECK_S_MIN, min(CHECK_S_MAX, soonest / 2 if soonest > CHECK_S_MIN else soonest)))
    return found, rest_s


def stop_changes(snapshot: Snapshot, found: Sequence[Exhaustion], now_ms: int) -> Iterator[Change]:
    """The sandboxes that run on accounts with nothing left, stopped, each once."""
    stopped = set()
    for exhaustion in found:
        for host_id, sandbox_id in sorted(snapshot.sums.members.get(exhaustion.account, ())):
            record, order = snapshot.records.get(sandbox_id), snapshot.assignments.get(sandbox_id)
            if record is None or order is None or order.host_id != host_id or sandbox_id in stopped:
                continue
            if _runs(snapshot, record, order):
                stopped.add(sandbox_id)
                yield _stop(snapshot, record, order, exhaustion, now_ms)


def reason_of(exhaustion: Exhaustion) -> Reason:
    """Why a sandbox was stopped: which account, which dimension, and what would help."""
    message = say_exhausted(*exhaustion.account, exhaustion.name, exhaustion.limit, exhaustion.used)
    return Reason(BUDGET_EXHAUSTED, message, "raise the limit with mb budget set, then mb start NAME")


def _runs(snapshot: Snapshot, record: SandboxRecord, order: Assignment) -> bool:
    if record.goal is not Goal.RUN or snapshot.assignment_of(record) is not order or snapshot.is_resuming(record):
        return False
    status = snapshot.status_of(order)
    return status is None or status.phase not in ENDED_PHASES or status.run < record.run


def _stop(snapshot: Snapshot, record: SandboxRecord, order: Assignment, exhaustion: Exhaustion, now_ms: int) -> Change:
    place = (order.host_id, record.sandbox_id)
    key = record_key(record.tenant, record.sandbox_id)
    after = replace(record, goal=Goal.STOP, generation=record.generation + 1, reason=reason_of(exhaustion))
    told = events.moved(record, after, order.host_id, now_ms)
    conditions = unmoved(snapshot, key, assignment_key(*place), status_key(*place))
    return Change(conditions, (Put(key, encode(after)), *told))


def _post(snapshot: Snapshot, posting: Posting) -> Change:
    keys = (charged_key(posting.charged.host_id), *(_key(balance) for balance in posting.balances))
    writes = (Put(keys[0], encode(posting.charged)), *(Put(_key(one), encode(one)) for one in posting.balances))
    values = tuple(zip(keys, (posting.charged, *posting.balances), strict=True))
    return Change(unmoved(snapshot, *keys), writes, values=values)


def _key(balance: Balance) -> str:
    return balance_key(balance.tenant, balance.account)


def has_total(snapshot: Snapshot, account: Account) -> bool:
    """Whether what an account uses over time is limited."""
    return limits_of(snapshot, *account).total != Totals()
