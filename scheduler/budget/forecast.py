"""What accounts use between their hosts' meters, and when what they have left runs out at the present rate. PURE."""

from collections.abc import Mapping
from dataclasses import dataclass

from fleet.model.assignment import Assignment
from fleet.model.budget import MeterEntry
from fleet.model.ids import HostId
from fleet.model.sandbox import ENDED_PHASES, SandboxStatus, StageName, Totals
from scheduler.budget.accounts import Account, limits_of
from scheduler.budget.balance import TOTAL_WORDS, find_exhausted, spent_of
from scheduler.budget.journal import Placed, add_totals, due_of, price_of
from scheduler.placement.snapshot import Snapshot

# A host publishes its meter every 15 s. One that has not for three times as long may have paused what it runs: nothing past that is
# taken for used before it says so.
ESTIMATE_MS_MAX = 45_000
HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Use:
    """What an account, with all below it, has used by estimate, and what it uses in an hour at the present rate."""

    used: Totals
    hourly: Totals


class Readings:
    """The meters of a snapshot by placement, read once."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._metered: dict[HostId, Mapping[Placed, MeterEntry]] = {}
        self._charged: dict[HostId, Mapping[Placed, MeterEntry]] = {}

    def use_of(self, account: Account, now_ms: int) -> Use:
        """What the account has used and uses."""
        used, hourly = spent_of(self._snapshot, *account), Totals()
        for host_id, sandbox_id in self._snapshot.sums.members.get(account, ()):
            order = self._snapshot.assignments.get(sandbox_id)
            if order is None or order.host_id != host_id:
                order = self._snapshot.remnants.get((host_id, sandbox_id))
            if order is None:
                continue
            owed, rate = self._of_order(order, now_ms)
            used, hourly = add_totals(used, owed), add_totals(hourly, rate)
        return Use(used, hourly)

    def _of_order(self, order: Assignment, now_ms: int) -> tuple[Totals, Totals]:
        """What one placement owes by estimate, and what it uses in an hour."""
        snapshot, placed = self._snapshot, (order.sandbox_id, max(1, order.placement))
        metered, charged = self._entries(order.host_id)
        known, paid = metered.get(placed), charged.get(placed)
        used = known.used if known is not None else Totals()
        before = paid.used if paid is not None else Totals()
        rate, since_ms = Totals(), 0
        status = snapshot.status_of(order)
        if status is not None and order.host_id in snapshot.alive:
            since_ms = _runs_since_ms(status)
        if since_ms:
            meter = snapshot.meters.get(order.host_id)
            since_ms = max(since_ms, meter.at_ms if meter is not None and known is not None else 0)
            rate = self._rate_of(order)
            used = add_totals(used, _share(rate, min(max(0, now_ms - since_ms), ESTIMATE_MS_MAX)))
        return due_of(used, before, snapshot.prices), rate

    def _rate_of(self, order: Assignment) -> Totals:
        gpu_ms = sum(share.milli for share in order.gpus) * HOUR_MS // 1000
        rate = Totals(HOUR_MS, order.spec.resources.vcpus * HOUR_MS, gpu_ms)
        return add_totals(rate, Totals(cost_micro=price_of(rate, self._snapshot.prices)))

    def _entries(self, host_id: HostId) -> tuple[Mapping[Placed, MeterEntry], Mapping[Placed, MeterEntry]]:
        if host_id not in self._metered:
            meter, charged = self._snapshot.meters.get(host_id), self._snapshot.charged.get(host_id)
            self._metered[host_id] = _by_placement(meter.entries if meter is not None else ())
            self._charged[host_id] = _by_placement(charged.entries if charged is not None else ())
        return self._metered[host_id], self._charged[host_id]


@dataclass(frozen=True, slots=True)
class Exhaustion:
    """An account that has used up one dimension: its word, the limit and the use."""

    account: Account
    name: str
    limit: int
    used: int


def find_exhaustion(snapshot: Snapshot, readings: Readings, account: Account, now_ms: int) -> Exhaustion | None:
    """The first dimension that the account has used up by estimate."""
    limit = limits_of(snapshot, *account).total
    found = find_exhausted(limit, readings.use_of(account, now_ms).used) if limit != Totals() else None
    return Exhaustion(account, *found) if found is not None else None


def left_s(limit: Totals, use: Use) -> dict[str, float]:
    """In how many seconds each limited dimension runs out at the present rate; one of which nothing is used now is left out."""
    found: dict[str, float] = {}
    for name in TOTAL_WORDS:
        most, have, hourly = getattr(limit, name), getattr(use.used, name), getattr(use.hourly, name)
        if most and (hourly or have >= most):
            found[name] = max(0.0, (most - have) / hourly * 3600) if have < most else 0.0
    return found


def is_running(status: SandboxStatus) -> bool:
    """Whether its domain runs by what its host says."""
    return _runs_since_ms(status) > 0


def _runs_since_ms(status: SandboxStatus) -> int:
    if status.phase in ENDED_PHASES or status.released:
        return 0
    return next((stage.at_ms for stage in status.stages if stage.name == StageName.DOMAIN_STARTED), 0)


def _by_placement(entries: tuple[MeterEntry, ...]) -> dict[Placed, MeterEntry]:
    return {(entry.sandbox_id, entry.placement): entry for entry in entries}


def _share(hourly: Totals, elapsed_ms: int) -> Totals:
    return Totals(
        hourly.wall_ms * elapsed_ms // HOUR_MS,
        hourly.vcpu_ms * elapsed_ms // HOUR_MS,
        hourly.gpu_ms * elapsed_ms // HOUR_MS,
    )
