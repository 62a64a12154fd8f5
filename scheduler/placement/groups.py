"""Sandboxes that are placed together or not at all. PURE.

A group is what one tenant calls so, of one size and priority. It holds together until its members are placed: whoever loses its
host later is placed again alone. Members have to be in the store before they are placed: one transaction cannot both create and
place as many as a group may have.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fleet.model.assignment import RefusalReason
from fleet.model.ids import HostId, SandboxId, Tenant
from fleet.model.sandbox import SandboxRecord
from scheduler.placement.cluster import Choice, Cluster
from scheduler.placement.snapshot import Snapshot
from scheduler.placement.wishes import Ask

GROUP_INCOMPLETE = "group_incomplete"
# Hosts tried for the members of one group before it is given up for this plan: some 30 ms. Alike members never need more than one
# each; for unlike ones all arrangements of a few members on a few hosts are within it.
LOOKS_MAX = 500

Key = tuple[Tenant, str, int, int]
Seats = tuple[tuple[Ask, Choice], ...]


@dataclass(frozen=True, slots=True)
class Group:
    """What waits of one group of `size`, of which `known` are there: `members` to be placed, and the `surplus` past its size."""

    name: str
    size: int
    known: int
    members: tuple[Ask, ...]
    surplus: tuple[Ask, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether all of its members are there."""
        return self.known >= self.size


@dataclass(slots=True)
class _Search:
    """How many looks are left, and the first member that found no host, with the reasons there were."""

    looks: int = field(default_factory=lambda: LOOKS_MAX)
    stuck: Ask | None = None
    reasons: tuple[RefusalReason, ...] = field(default=())


def groups_of(snapshot: Snapshot, asks: Iterable[Ask]) -> Mapping[SandboxId, Group]:
    """The group of each that waits for its first placement in one."""
    waiting: dict[Key, list[Ask]] = {}
    for ask in asks:
        if ask.record.spec.placement.group and _is_first(snapshot, ask.record):
            waiting.setdefault(_key(ask.record), []).append(ask)
    made = (_group(snapshot, key, found) for key, found in waiting.items())
    return {ask.record.sandbox_id: group for group in made for ask in (*group.members, *group.surplus)}


def seat(cluster: Cluster, members: Sequence[Ask]) -> tuple[Seats, tuple[RefusalReason, ...]]:
    """Takes a host for every member, or none and says why. The largest choose first; where one finds none, others move."""
    search = _Search()
    found = _seat(cluster, sorted(members, key=_largest_first), frozenset(), search)
    if found is not None:
        return found, ()
    assert search.stuck is not None
    name, others = search.stuck.record.spec.name, len(members) - 1
    told = f"{name} finds no host beside the other {others} of its group" if others else f"{name} finds no host"
    if not search.looks:
        told += f", in {LOOKS_MAX} ways that were tried"
    return (), (RefusalReason(GROUP_INCOMPLETE, 0, told), *search.reasons)


def incomplete(group: Group, ask: Ask) -> tuple[RefusalReason, ...]:
    """Why one waits that waits for the others."""
    if ask in group.surplus:
        text = f"group {group.name} has its {group.size} members without it"
    else:
        text = f"group {group.name} has {group.known} of its {group.size} members so far"
    return (RefusalReason(GROUP_INCOMPLETE, 0, text),)


def _seat(cluster: Cluster, members: Sequence[Ask], tried: frozenset[HostId], search: _Search) -> Seats | None:
    if not members:
        return ()
    first, rest = members[0], members[1:]
    while search.looks:
        search.looks -= 1
        wish = replace(first.wish, avoid_hosts=first.wish.avoid_hosts | tried)
        choice = cluster.choose(first.demand, wish)
        if choice is None:
            if search.stuck is None:
                search.stuck, search.reasons = first, cluster.refuse(first.demand, first.wish)
            return None
        cluster.take(choice.host_id, choice.share)
        # What one of equals has tried in vain, the next need not: the two would only change places.
        is_alike = bool(rest) and rest[0].wants == first.wants
        found = _seat(cluster, rest, tried if is_alike else frozenset(), search)
        if found is not None:
            return ((first, choice), *found)
        cluster.give_back(choice.host_id, choice.share)
        if all(one.wants == first.wants for one in rest):
            return None
        tried |= {choice.host_id}
    return None


def _group(snapshot: Snapshot, key: Key, waiting: Sequence[Ask]) -> Group:
    tenant, name, size, _ = key
    fellows = (snapshot.records[one] for one in snapshot.sums.groups.get((tenant, name), ()))
    placed = sum(_key(one) == key and not _is_first(snapshot, one) for one in fellows)
    here = sorted(waiting, key=lambda ask: (ask.record.created_at_ms, ask.record.sandbox_id))
    stored = [ask for ask in here if ask.record.sandbox_id in snapshot.records]
    seats = max(0, size - placed)
    known = placed + len(stored)
    # Those that are only being accepted wait with the others, whether they are counted or not.
    members = tuple(stored[:seats])
    return Group(name, size, known, members, tuple(ask for ask in here if ask not in members))


def _key(record: SandboxRecord) -> Key:
    placement = record.spec.placement
    return record.tenant, placement.group, placement.group_size, placement.priority


def _is_first(snapshot: Snapshot, record: SandboxRecord) -> bool:
    return record.placement <= 1 and record.sandbox_id not in snapshot.assignments


def _largest_first(ask: Ask) -> tuple[int, int, int, int, int, str]:
    demand, record = ask.demand, ask.record
    gpus = demand.gpus * demand.gpu_milli
    return -gpus, -demand.vcpu_milli, -demand.memory_mib, -demand.disk_mib, record.created_at_ms, record.sandbox_id
