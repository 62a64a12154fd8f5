"""The hosts as a plan sees them: which one is the best for a sandbox, with what is left moving as sandboxes are placed. PURE.

`choose` looks and takes nothing; `take` and `give_back` move what is left; `mark` and `rollback` undo a group that did not fit as a
whole. The same hosts and calls give the same choices, in whatever order the hosts came: ties go to the first host by its id.
"""

from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NewType

import numpy as np

from fleet.model.assignment import GpuShare, RefusalReason
from fleet.model.ids import Digest, HostId, Tenant
from scheduler.placement.columns import Change, Hosts
from scheduler.placement.demand import ANYWHERE, NO_TENANT, Demand, Shape, Wish
from scheduler.placement.devices import choose_devices, choose_node
from scheduler.placement.explanation import Explanation, explain
from scheduler.placement.fragmentation import DEFAULT_POPULARITY, Values
from scheduler.placement.hosts import HostView, Share
from scheduler.placement.neighbourhood import Neighbourhood
from scheduler.placement.refusals import crowded, refuse
from scheduler.placement.rows import NEARLY_NEVER, Row, held_digest
from scheduler.placement.weights import Weights

Mark = NewType("Mark", int)

VOID = "the mark is void: a host has changed since, or it was ended before"
# Rows that are kept: request classes in use at once. At 50,000 hosts each takes 0.9 MB.
ROWS_MAX = 256
# The log of changed hosts; a row that is further behind is made anew, which costs less by then.
LOG_MAX = 65_536
# Hosts that may become others, by labels or images, before all rows are made anew.
ALTERED_MAX = 16_384
# When more than this part of all hosts has changed, looking at all of them is faster than at those.
RENEW_PART = 2


@dataclass(frozen=True, slots=True)
class Choice:
    """The best host for a sandbox, with the devices and the NUMA node on it; `share` is what it would take there."""

    host_id: HostId
    gpus: tuple[GpuShare, ...]
    numa_node: int
    score: int
    share: Share
    image_digest: Digest


class Cluster:
    """All hosts and what is left of them."""

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = weights or Weights()
        self._hosts = Hosts()
        self._near = Neighbourhood(self._hosts, self.weights)
        self._rows: OrderedDict[Demand, Row] = OrderedDict()
        # Places of changed hosts; `_dropped` earlier ones are not in it any more.
        self._log = np.zeros(LOG_MAX, np.int64)
        self._logged = self._dropped = 0
        # Places of hosts that are others than before, by labels or images for example.
        self._altered: list[int] = []
        self._undo: list[tuple[HostId, Share, int]] = []
        self._marks = 0
        self._popularity: tuple[tuple[Shape, int], ...] = DEFAULT_POPULARITY

    def __len__(self) -> int:
        return len(self._hosts)

    def upsert_host(self, view: HostView) -> None:
        """Takes up a host as the store has it now; marks set before are void."""
        self._forget_marks()
        before = len(self._hosts)
        place, change = self._hosts.put(view)
        self._near.put(view)
        if self._hosts.is_overgrown:
            self._hosts.intern_anew()
            self._drop_rows()
        elif len(self._hosts) > before or len(self._altered) >= ALTERED_MAX:
            self._drop_rows()
        elif change is Change.KIND:
            self._altered.append(place)
        if change is not Change.NOTHING:
            self._note(place)

    def remove_host(self, host_id: HostId) -> None:
        """Forgets a host; one that is not there is none."""
        self._forget_marks()
        if host_id in self._hosts.index:
            self._hosts.drop(host_id)
            self._near.drop(host_id)
            self._drop_rows()

    def set_holders(self, tenant: Tenant, digest: Digest, holders: AbstractSet[HostId]) -> None:
        """Says which hosts hold a source of a tenant."""
        self._near.set_holders(tenant, digest, holders)

    def set_popularity(self, popularity: Sequence[tuple[Shape, int]]) -> None:
        """Says what the sandboxes to come look like: shapes with how often each is asked for; none: what nobody knows better."""
        self._popularity = tuple(popularity) or DEFAULT_POPULARITY
        self._hosts.set_values(Values(self._popularity, self._hosts.kinds.values, self.weights.fragmentation))
        self._drop_rows()

    def take(self, host_id: HostId, share: Share) -> None:
        """Sets a share of a host aside."""
        self._shift(host_id, share, 1)

    def give_back(self, host_id: HostId, share: Share) -> None:
        """Frees a share of a host."""
        self._shift(host_id, share, -1)

    def mark(self) -> Mark:
        """A point to come back to; ends with `rollback` or `keep`. Marks may lie within each other."""
        self._marks += 1
        return Mark(len(self._undo))

    def rollback(self, mark: Mark) -> None:
        """Undoes what was taken and given back since `mark`; raises ValueError where the mark is void."""
        if not self._marks or mark > len(self._undo):
            raise ValueError(VOID)
        while len(self._undo) > mark:
            host_id, share, sign = self._undo.pop()
            self._move(host_id, share, -sign)
        self._marks -= 1

    def keep(self, mark: Mark) -> None:
        """Lets what was done since `mark` stand; raises ValueError where the mark is void."""
        if not self._marks or mark > len(self._undo):
            raise ValueError(VOID)
        self._marks -= 1
        if not self._marks:
            self._forget_marks()

    def choose(self, demand: Demand, wish: Wish = ANYWHERE) -> Choice | None:
        """The best host that can carry it, or None."""
        row = self._row(demand)
        place, score = self._near.best(row, wish)
        if score <= NEARLY_NEVER:
            return None
        return self._choice(row, wish, place, score)

    def refuse(self, demand: Demand, wish: Wish = ANYWHERE) -> tuple[RefusalReason, ...]:
        """Why no host can carry it, as counts of hosts by the filter that excludes them; one reason where waiting is in vain."""
        return refuse(self._row(demand), wish)

    def crowded(self, demand: Demand, wish: Wish = ANYWHERE) -> tuple[HostId, ...]:
        """The hosts that lack nothing but room, and would have it if they were empty; in the order of their ids."""
        return crowded(self._row(demand), wish)

    def considered(self, wish: Wish = ANYWHERE) -> int:
        """How many hosts are looked at for it."""
        return int(wish.pinned_host in self._hosts.index) if wish.pinned_host else len(self._hosts)

    def explain(self, demand: Demand, wish: Wish = ANYWHERE, hosts_max: int = 10) -> Explanation:
        """The best hosts with every term of their scores, what excludes the others, and what would make it fit."""
        return explain(self._row(demand), self._near, wish, hosts_max)

    def _choice(self, row: Row, wish: Wish, place: int, score: int) -> Choice:
        hosts, demand = self._hosts, row.demand
        view = hosts.views[place]
        gpus = choose_devices(row, place) if demand.gpus else ()
        memory_mib = int(row.need[1, hosts.accelerator[place]])
        node = choose_node(hosts, place, (demand.vcpu_milli, memory_mib), gpus) if view.record.numa_nodes else -1
        share = Share(demand.vcpu_milli, memory_mib, demand.disk_mib, 1, gpus, node, wish.tenant)
        digest = held_digest(demand.image, view.record.images)
        return Choice(view.record.host_id, gpus, node, score, share, digest)

    def _row(self, demand: Demand) -> Row:
        hosts = self._hosts
        if not hosts.is_sorted:
            hosts.sort()
            self._drop_rows()
        if len(hosts.kinds.values) > hosts.values.kinds:
            self.set_popularity(self._popularity)
        row = self._rows.get(demand)
        if row is None:
            row = self._rows[demand] = Row(hosts, demand, self.weights)
            row.seen, row.altered = self._logged, len(self._altered)
            if len(self._rows) > ROWS_MAX:
                self._rows.popitem(last=False)
            return row
        self._rows.move_to_end(demand)
        self._catch_up(row)
        return row

    def _catch_up(self, row: Row) -> None:
        logged = self._logged
        behind = logged - row.seen
        if row.altered < len(self._altered):
            row.rebase(np.array(self._altered[row.altered :], np.int64))
            row.altered = len(self._altered)
        if not behind:
            return
        if row.seen < self._dropped or behind * RENEW_PART > len(self._hosts):
            row.renew()
        else:
            row.catch_up(self._log[row.seen - self._dropped : logged - self._dropped])
        row.seen = logged

    def _shift(self, host_id: HostId, share: Share, sign: int) -> None:
        if self._marks:
            self._undo.append((host_id, share, sign))
        self._move(host_id, share, sign)

    def _move(self, host_id: HostId, share: Share, sign: int) -> None:
        place = self._hosts.index[host_id]
        self._hosts.shift(place, share, sign)
        if share.tenant != NO_TENANT:
            self._near.count(share.tenant, host_id, sign * share.sandboxes)
        self._note(place)

    def _note(self, place: int) -> None:
        if self._logged - self._dropped == LOG_MAX:
            self._dropped += LOG_MAX // 2
            self._log[: LOG_MAX // 2] = self._log[LOG_MAX // 2 :]
        self._log[self._logged - self._dropped] = place
        self._logged += 1

    def _drop_rows(self) -> None:
        self._rows.clear()
        self._altered.clear()

    def _forget_marks(self) -> None:
        self._marks = 0
        self._undo.clear()
