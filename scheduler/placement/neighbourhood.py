"""What a single sandbox adds to its class: its tenant's other sandboxes, its sources, its parent. PURE.

Gains are for few hosts (those that hold its sources, its parent's rack) and are looked at one by one. Costs only lower a score: the
classes' rows stay an upper bound, and the best is found block by block until no block can have a better one.
"""

from collections import OrderedDict
from collections.abc import Set as AbstractSet

import numpy as np

from fleet.model.ids import Digest, HostId, Tenant
from fleet.model.sandbox import Affinity
from scheduler.placement.columns import WHOLE, Hosts, Ints
from scheduler.placement.demand import NO_TENANT, Wish
from scheduler.placement.hosts import NO_RACK, RACK_LABEL, HostView
from scheduler.placement.rows import BLOCK, NEARLY_NEVER, NEVER, Row
from scheduler.placement.weights import Weights

# From so many of a tenant's sandboxes on one host on, one more is no worse. So many also, that a single one counts less than that
# a host is filled, and only hosts with many of a tenant's lose to others.
SPREAD_MAX = 256
# Tenants whose counts are kept as an array; the others' are made when they are needed.
TENANTS_MAX = 64
# Blocks that are looked at singly before all hosts are looked at at once.
BLOCKS_MAX = 16

# Racks and sources whose places are kept.
SETS_MAX = 4_096
NOWHERE = np.zeros(0, np.int64)

Found = tuple[int, int]
# Places with what they lose.
Costs = list[tuple[Ints, int]]


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
        self._sets: OrderedDict[tuple[str, ...], Ints] = OrderedDict()
        # What some hosts gain or lose, by place, while it is looked up; zero otherwise.
        self._dense = np.zeros(0, np.int64)
        self._version = -1

    def put(self, view: HostView) -> None:
        """Takes up a host's rack and tenants."""
        host_id = view.record.host_id
        rack = next((label.value for label in view.record.labels if label.name == RACK_LABEL), NO_RACK)
        if rack == self._rack_of.get(host_id, NO_RACK) and view.tenant_counts == self._counts.get(host_id, {}):
            return
        self.drop(host_id)
        if rack != NO_RACK:
            self._racks.setdefault(rack, set()).add(host_id)
            self._sets.pop(("rack", rack), None)
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
            self._sets.pop(("rack", rack), None)
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
        self._sets.pop(("source", tenant, digest), None)
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
        """The best of the hosts that gain anything."""
        gains = self._gains(wish)
        if not gains:
            return 0, NEVER
        places = np.concatenate([places for _, places, _ in gains])
        scores = self.scores(row, wish, places)
        score = int(scores.max())
        return int(places[scores == score].min()), score

    def _search(self, row: Row, wish: Wish, found: Found) -> Found:
        place, score = found
        bounds = row.best.copy()
        size = len(self._hosts)
        costs = self._few_costs(wish)
        for _ in range(BLOCKS_MAX):
            block = int(bounds.argmax())
            bound = int(bounds[block])
            if bound <= NEARLY_NEVER or (-bound, block * BLOCK) > (-score, place):
                return place, score
            bounds[block] = NEVER
            part = slice(block * BLOCK, min(block * BLOCK + BLOCK, size))
            place, score = self._best_within(row, wish, (part, costs), (place, score))
        return self._best_within(row, wish, (slice(0, size), costs), (place, score))

    def _best_within(self, row: Row, wish: Wish, where: tuple[slice, Costs], found: Found) -> Found:
        """The better of what was found and the best in a part; of equals the first host."""
        part, costs = where
        scores = row.scores[part] + self._spread(wish, part)
        for places, cost in costs:
            inside = places[(places >= part.start) & (places < part.stop)]
            scores[inside - part.start] += cost
        at = int(scores.argmax())
        place, score = part.start + at, int(scores[at])
        return (place, score) if (-score, place) < (-found[1], found[0]) else found

    def scores(self, row: Row, wish: Wish, places: Ints, terms: dict[str, Ints] | None = None) -> Ints:
        """Some hosts' scores with gains and costs; `terms` takes up each part, weighted."""
        spread = self._spread(wish, places)
        found = {"tenant_spread": spread, "source_locality": np.zeros_like(spread), "lineage": np.zeros_like(spread)}
        self._refresh()
        dense = self._dense
        for name, holders, gain in self._gains(wish):
            dense[holders] = gain
            found[name] = found[name] + dense[places]
            dense[holders] = 0
        score: Ints = row.scores[places]
        for apart, cost in self._few_costs(wish):
            dense[apart] = cost
            if cost > NEARLY_NEVER:
                found["lineage"] = found["lineage"] + dense[places]
            else:
                score = score + dense[places]
            dense[apart] = 0
        for values in found.values():
            score = score + values
        if terms is not None:
            terms.update(found)
        return score

    def _few_costs(self, wish: Wish) -> Costs:
        """Hosts that few sandboxes would rather not have, or must not."""
        costs = []
        if wish.affinity is Affinity.AWAY:
            half = self._weights.lineage * (WHOLE // 2)
            costs += [(places, -half) for places in self._parents(wish)]
        if wish.avoid_hosts:
            costs.append((self._places(wish.avoid_hosts), NEVER))
        return costs

    def _gains(self, wish: Wish) -> list[tuple[str, Ints, int]]:
        """Hosts that gain, by the term in which they do."""
        gains = []
        each = self._weights.source_locality * WHOLE // max(1, len(wish.sources))
        for digest in wish.sources:
            places = self._known(("source", wish.tenant, digest), self._holders.get((wish.tenant, digest)))
            if len(places):
                gains.append(("source_locality", places, each))
        if wish.affinity is Affinity.NEAR:
            half = self._weights.lineage * (WHOLE // 2)
            gains += [("lineage", places, half) for places in self._parents(wish) if len(places)]
        return gains

    def _parents(self, wish: Wish) -> tuple[Ints, Ints]:
        """The parent's rack and its host: near or away counts half for each, so that its own host has all of it."""
        rack = self._known(("rack", wish.parent_rack), self._racks.get(wish.parent_rack))
        return rack, self._places({wish.parent_host})

    def _known(self, key: tuple[str, ...], members: AbstractSet[HostId] | None) -> Ints:
        """The places of a set of hosts, kept until hosts stand elsewhere or the set changes."""
        if not members:
            return NOWHERE
        self._refresh()
        places = self._sets.get(key)
        if places is None:
            places = self._sets[key] = self._places(members)
            if len(self._sets) > SETS_MAX:
                self._sets.popitem(last=False)
        return places

    def _places(self, members: AbstractSet[HostId]) -> Ints:
        index = self._hosts.index
        return np.array([index[host_id] for host_id in members if host_id in index], np.int64)

    def _refresh(self) -> None:
        if self._version != self._hosts.version:
            self._columns.clear()
            self._sets.clear()
            self._dense = np.zeros(len(self._hosts), np.int64)
            self._version = self._hosts.version

    def _spread(self, wish: Wish, places: Ints | slice) -> Ints:
        weight = self._weights.tenant_spread
        if wish.tenant == NO_TENANT or not weight:
            size = places.stop - places.start if isinstance(places, slice) else len(places)
            return np.zeros(size, np.int64)
        return np.minimum(self._column(wish.tenant)[places], SPREAD_MAX) * (-weight * (WHOLE // SPREAD_MAX))

    def _column(self, tenant: Tenant) -> Ints:
        self._refresh()
        column = self._columns.get(tenant)
        if column is None:
            column = self._columns[tenant] = np.zeros(len(self._hosts), np.int64)
            for host_id, count in self._hosts_of.get(tenant, {}).items():
                column[self._hosts.index[host_id]] = count
            if len(self._columns) > TENANTS_MAX:
                self._columns.popitem(last=False)
        self._columns.move_to_end(tenant)
        return column
