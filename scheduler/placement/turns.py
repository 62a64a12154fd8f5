"""Whose turn it is in a plan, and what each tenant may cost it. PURE.

The highest priority first; among equals the tenant that has the least of what it has most of (dominant resource fairness, Ghodsi
and others, NSDI 2011: https://www.usenix.org/conference/nsdi11/dominant-resource-fairness-fair-allocation-multiple-resource-types),
divided by what it is due; then the oldest. With every placement its tenant's share grows, so tenants take turns.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from zlib import crc32

from fleet.model.ids import Tenant
from fleet.model.sandbox import Amounts, Resources
from scheduler.placement.demand import DEVICE_MILLI
from scheduler.placement.settings import Settings
from scheduler.placement.snapshot import Snapshot
from scheduler.placement.wishes import Ask

# Looks at a host for a sandbox that fits on none; so many take some 50 ms, with the reasons. Tenants share them: one that wants a
# thousand different impossible things waits for its own turn, and for nobody else's.
LOOKS_MAX = 200_000
# Shares of the fleet are compared as integers in billionths: one vCPU of a million is told apart from two.
WHOLE = 1_000_000_000

Key = tuple[int, int, int, str, int]


class Turns:
    """The order of what waits, asked one by one while a plan places them."""

    def __init__(self, snapshot: Snapshot, hosts: int, asks: Sequence[Ask], settings: Settings, seed: int) -> None:
        self._hosts = hosts
        self._seed = seed
        self._settings = settings
        self._fleet = snapshot.sums.capacity
        self._held = {ask.record.tenant: _held(snapshot, ask.record.tenant) for ask in asks}
        self._looks = LOOKS_MAX // max(1, len(self._held))
        self._spent: Counter[Tenant] = Counter()
        self._left = len(asks)
        self._queues = self._in_queues(asks)
        self._heap: list[Key] = [self._key(number) for number, _ in enumerate(self._queues)]
        heapq.heapify(self._heap)

    def next(self) -> Ask | None:
        """Whose turn it is; None when all had theirs."""
        while self._heap:
            key = heapq.heappop(self._heap)
            number = key[-1]
            now = self._key(number)
            # Its tenant was given something since it was put there, so it comes later.
            if now > key and self._heap and now > self._heap[0]:
                heapq.heappush(self._heap, now)
                continue
            ask = self._queues[number].pop()
            if self._queues[number]:
                heapq.heappush(self._heap, self._key(number))
            return ask
        return None

    def give(self, ask: Ask) -> None:
        """It was placed: its tenant has so much more."""
        tenant, resources = ask.record.tenant, ask.record.spec.resources
        self._held[tenant] = _sum(self._held[tenant], resources)

    def spend(self, ask: Ask) -> None:
        """It was looked at in vain."""
        self._spent[ask.record.tenant] += self._cost(ask)

    def is_over(self, ask: Ask) -> bool:
        """Whether its tenant has had its looks; of every plan each has one look at all hosts."""
        return self._spent[ask.record.tenant] >= self._looks

    def _cost(self, ask: Ask) -> int:
        return 1 if ask.known is not None else self._hosts

    def _in_queues(self, asks: Sequence[Ask]) -> list[list[Ask]]:
        """What waits by priority and tenant, the oldest at the end."""
        queues: dict[tuple[int, Tenant], list[Ask]] = {}
        for ask in sorted(asks, key=lambda one: (one.record.created_at_ms, one.record.sandbox_id)):
            queues.setdefault((ask.record.spec.placement.priority, ask.record.tenant), []).append(ask)
        return [self._turn(queue)[::-1] for queue in queues.values()]

    def _turn(self, queue: list[Ask]) -> list[Ask]:
        """The oldest first; where they may want too much, from a place that is another for each seed."""
        # No look costs more than all hosts: few cannot want too much, and need not be told apart.
        if len(queue) * self._hosts <= self._looks:
            return queue
        if sum({ask.wants: self._cost(ask) for ask in queue}.values()) <= self._looks:
            return queue
        start = crc32(str(self._seed).encode()) % len(queue)
        return queue[start:] + queue[:start]

    def _key(self, number: int) -> Key:
        record = self._queues[number][-1].record
        share = _dominant(self._held[record.tenant], self._fleet) // self._settings.due_to(record.tenant)
        return -record.spec.placement.priority, share, record.created_at_ms, record.sandbox_id, number


def _held(snapshot: Snapshot, tenant: Tenant) -> Amounts:
    return snapshot.sums.reserved_by_tenant.get(tenant, Amounts())


def _sum(held: Amounts, more: Resources) -> Amounts:
    return Amounts(
        held.vcpus + more.vcpus,
        held.memory_mib + more.memory_mib,
        held.disk_mib + more.disk_mib,
        held.gpu_milli + more.gpus * (more.gpu_milli or DEVICE_MILLI),
        held.sandboxes + 1,
    )


def _dominant(held: Amounts, fleet: Amounts) -> int:
    """The largest of a tenant's shares of the fleet, in parts of WHOLE."""
    pairs = (
        (held.vcpus, fleet.vcpus),
        (held.memory_mib, fleet.memory_mib),
        (held.disk_mib, fleet.disk_mib),
        (held.gpu_milli, fleet.gpu_milli),
    )
    return max(amount * WHOLE // max(1, whole) for amount, whole in pairs)
