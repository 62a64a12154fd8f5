"""What a single sandbox adds to its class: its tenant's other sandboxes, its sources, its parent. PURE.

Gains are for few hosts (those that hold its sources, its parent's rack) and are looked at one by one. Costs only lower a score: the
classes' rows stay an upper bound, and the best is found block by block until no block can have a better one.
"""

from collections import OrderedDict
from collections.abc import Set as AbstractSet

import numpy as np

from fleet.model.ids import Digest, HostId, Tenant
from fleet.model.sandbox import Affinity
from scheduler.placement.demand import NO_TENANT, Wish
from scheduler.placement.hosts import NO_RACK, WHOLE, Hosts, HostView, Ints
from scheduler.placement.rows import BLOCK, NEARLY_NEVER, NEVER, Row
from scheduler.placement.weights import Weights

# From so many of a tenant's sandboxes on one host on, one more is no worse. So many also, that a single one counts less than that
# a host is filled, and only hosts with many of a tenant's lose to others.
SPREAD_MAX = 256
# Tenants whose counts are kept as an array; the others' are made when they are needed.
TENANTS_MAX = 64
# Blocks that are looked at singly before all hosts are looked at at once.
BLOCKS_MAX = 6

Found = tuple[int, int]


class Neighbourhood:
    """Who and what is where, beside what is left of each host."""

    def __init__(self, hosts: Hosts, weights: Weights) -> None:
        self._hosts = hosts
        self._weights = weights
        self._counts: dict[HostId, dict[Tenant, int]] = {}
        self._hosts_of: dict[Tenant, dict[HostId, int]] = {}
        self._racks: dict[str, set[HostId]] = {}
        self._rack_of: dict[HostId, str] = {}
        self._holders: dict[tuple[Tenant, Digest], frozenset[HostId]] = {}
        self._columns: OrderedDict[Tenant, Ints] = OrderedDict()
        self._version = -1

    def put(self, view: HostView) -> None:
        """Takes up a host's rack and tenants."""
        host_id = view.record.host_id
        self.drop(host_id)
        rack = next((label.value for label in view.record.labels if label.name == "rack"), NO_RACK)
        if rack != NO_RACK:
            self._racks.setdefault(rack, set()).add(host_id)
            self._rack_of[host_id] = rack
        for tenant, count in view.tenant_counts.items():
            self.count(tenant, host_id, count)

    def drop(self, host_id: HostId) -> None:
        """Forgets a host's rack and tenants."""
        for tenant, count in list(self._counts.get(host_id, {}).items()):
            self.count(tenant, host_id, -count)
        rack = self._rack_of.pop(host_id, NO_RACK)
        if rack != NO_RACK:
            self._racks[rack].discard(host_id)
            if not self._racks[rack]:
                del self._racks[rack]

    def count(self, tenant: Tenant, host_id: HostId, change: int) -> None:
        """So many sandboxes of a tenant have come to a host."""
        hosts_of, counts = self._hosts_of.setdefault(tenant, {}), self._counts.setdefault(host_id, {})
        total = hosts_of.get(host_id, 0) + change
        if total:
            hosts_of[host_id] = counts[tenant] = total
        else:
            hosts_of.pop(host_id, None)
            counts.pop(tenant, None)
            if not hosts_of:
                del self._hosts_of[tenant]
            if not counts:
                del self._counts[host_id]
        column = self._columns.get(tenant)
        if column is not None and self._version == self._hosts.version:
            column[self._hosts.index[host_id]] = total

    def set_holders(self, tenant: Tenant, digest: Digest, holders: AbstractSet[HostId]) -> None:
        """Says which hosts hold a tenant's source."""
        if holders:
            self._holders[tenant, digest] = frozenset(holders)
        else:
            self._holders.pop((tenant, digest), None)

    def best(self, row: Row, wish: Wish) -> Found:
        """The place of the best host and its score; NEARLY_NEVER or less where there is none."""
        if not len(self._hosts):
            return 0, NEVER
        if wish.pinned_host:
            place = self._hosts.index.get(wish.pinned_host)
            if place is None:
                return 0, NEVER
            return place, int(self.scores(row, wish, np.array([place]))[0])
        if wish.is_plain:
            block = int(row.best.argmax())
            within = row.blocks[block]
            inside = int(within.argmax())
            return block * BLOCK + inside, int(within[inside])
        return self._search(row, wish, self._best_gain(row, wish))

    def _best_gain(self, row: Row, wish: Wish) -> Found:
        places = self._gaining(wish)
        if not len(places):
            return 0, NEVER
        scores = self.scores(row, wish, places)
        at = int(scores.argmax())
        return int(places[at]), int(scores[at])

    def _search(self, row: Row, wish: Wish, found: Found) -> Found:
        place, score = found
        bounds = row.best.copy()
        size = len(self._hosts)
        for _ in range(BLOCKS_MAX):
            block = int(bounds.argmax())
            bound = int(bounds[block])
            if bound <= NEARLY_NEVER or (-bound, block * BLOCK) > (-score, place):
                return place, score
            bounds[block] = NEVER
            first = block * BLOCK
            part = slice(first, min(first + BLOCK, size))
            place, score = _better((place, score), first, row.scores[part] + self._costs(wish, part))
        everything = slice(0, size)
        return _better((place, score), 0, row.scores[everything] + self._costs(wish, everything))

    def scores(self, row: Row, wish: Wish, places: Ints, terms: dict[str, Ints] | None = None) -> Ints:
        """Some hosts' scores with gains and costs; `terms` takes up each part, weighted."""
        gains = {"source_locality": self._sources_at(wish, places), "lineage": self._lineage_at(wish, places)}
        costs = self._costs(wish, places)
        if terms is not None:
            terms.update(gains)
            terms["tenant_spread"] = self._spread(wish, places)
        away = self._away_at(wish, places)
        if terms is not None:
            terms["lineage"] = gains["lineage"] + away
        score: Ints = row.scores[places] + costs
        for gain in gains.values():
            score = score + gain
        return score

    def _costs(self, wish: Wish, places: Ints | slice) -> Ints:
        numbers = np.arange(len(self._hosts))[places] if isinstance(places, slice) else places
        costs = self._spread(wish, places) + self._away_at(wish, numbers)
        for host_id in wish.avoid_hosts:
            place = self._hosts.index.get(host_id)
            if place is not None:
                costs[numbers == place] = NEVER
        return costs

    def _spread(self, wish: Wish, places: Ints | slice) -> Ints:
        if wish.tenant == NO_TENANT or not self._weights.tenant_spread:
            return np.zeros(len(self._hosts), np.int64)[places]
        return np.minimum(self._column(wish.tenant)[places], SPREAD_MAX) * (
            -self._weights.tenant_spread * (WHOLE // SPREAD_MAX)
        )

    def _column(self, tenant: Tenant) -> Ints:
        if self._version != self._hosts.version:
            self._columns.clear()
            self._version = self._hosts.version
        column = self._columns.get(tenant)
        if column is None:
            column = self._columns[tenant] = np.zeros(len(self._hosts), np.int64)
            for host_id, count in self._hosts_of.get(tenant, {}).items():
                column[self._hosts.index[host_id]] = count
            if len(self._columns) > TENANTS_MAX:
                self._columns.popitem(last=False)
        self._columns.move_to_end(tenant)
        return column

    def _gaining(self, wish: Wish) -> Ints:
        """The places of all hosts that gain anything, in order."""
        gaining: set[HostId] = set()
        for digest in wish.sources:
            gaining |= self._holders.get((wish.tenant, digest), frozenset())
        if wish.affinity is Affinity.NEAR:
            gaining |= self._racks.get(wish.parent_rack, set()) | {wish.parent_host}
        index = self._hosts.index
        return np.array(sorted(index[host_id] for host_id in gaining if host_id in index), np.int64)

    def _sources_at(self, wish: Wish, places: Ints) -> Ints:
        gain = np.zeros(len(places), np.int64)
        each = self._weights.source_locality * WHOLE // max(1, len(wish.sources))
        for digest in wish.sources:
            gain += each * self._are_in(self._holders.get((wish.tenant, digest), frozenset()), places)
        return gain

    def _lineage_at(self, wish: Wish, places: Ints) -> Ints:
        return self._parent_at(wish, places) if wish.affinity is Affinity.NEAR else np.zeros(len(places), np.int64)

    def _away_at(self, wish: Wish, places: Ints) -> Ints:
        return -self._parent_at(wish, places) if wish.affinity is Affinity.AWAY else np.zeros(len(places), np.int64)

    def _parent_at(self, wish: Wish, places: Ints) -> Ints:
        """All of the weight for the parent's host, half of it for its rack."""
        half = self._weights.lineage * (WHOLE // 2)
        own = self._are_in(frozenset({wish.parent_host}), places)
        return half * self._are_in(self._racks.get(wish.parent_rack, frozenset()), places) + half * own

    def _are_in(self, members: AbstractSet[HostId], places: Ints) -> Ints:
        index = self._hosts.index
        found = [index[host_id] for host_id in members if host_id in index]
        return np.isin(places, np.array(found, np.int64)).astype(np.int64)


def _better(found: Found, first: int, scores: Ints) -> Found:
    """The better of what was found and the best of `scores`, which begin at place `first`; of equals the first host."""
    at = int(scores.argmax())
    return min(found, (first + at, int(scores[at])), key=lambda one: (-one[1], one[0]))
