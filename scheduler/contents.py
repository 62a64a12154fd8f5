"""The store's keys, decoded into a snapshot that is kept up key by key: a change costs the same whatever there is beside it.

A value that cannot be read is told in one log line and left out, and what it may be about is opaque; nothing in the store can
stop the scheduler. Decides nothing, and knows no store.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

import structlog

from fleet.codec import decode
from fleet.errors import BedplateError
from fleet.model.assignment import Assignment, Refusal
from fleet.model.budget import Balance, Budget, Charged, Meter, Prices
from fleet.model.host import HostCordon, HostLosses, HostRecord, Reservation
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import SandboxRecord, SandboxStatus
from fleet.store import keyspace
from fleet.store.keyspace import ROOT
from fleet.store.port import KeyValue
from scheduler.budget.accounts import sandbox_account
from scheduler.placement.snapshot import Snapshot, Sums, accounts_of, set_aside
from scheduler.placement.upkeep import ClusterUpkeep

K = TypeVar("K")
V = TypeVar("V")

DIGEST_BITS = 256
# Values that this scheduler wrote and has not seen come back: a second's worth of the fastest burst.
WRITTEN_MAX = 20_000

log = structlog.get_logger()


class Written:
    """Values that were just written, so that they need not be decoded when they come back."""

    def __init__(self) -> None:
        self._values: OrderedDict[str, tuple[bytes, object]] = OrderedDict()

    def expect(self, key: str, content: bytes, value: object) -> None:
        """`content` is written under `key`, and stands for `value`."""
        self._values[key] = (content, value)
        if len(self._values) > WRITTEN_MAX:
            self._values.popitem(last=False)

    def take(self, kind: type, entry: KeyValue) -> Any:
        """The value that `entry` is known to stand for, once; None where that is not known."""
        known = self._values.pop(entry.key, None)
        return known[1] if known is not None and known[0] == entry.value and isinstance(known[1], kind) else None


class Contents:
    """Everything under ROOT, decoded; `snapshot` is a view that every `put` moves on.

    `touched` are the sandboxes, and `stirred` the hosts, about which something may be due; whoever takes them empties them.
    `upkeep` hears of each host and source that changes, too.
    """

    def __init__(self, written: Written | None = None, upkeep: ClusterUpkeep | None = None) -> None:
        self._upkeep = upkeep or ClusterUpkeep()
        self._written = written or Written()
        self._mod_revisions: dict[str, int] = {}
        self._digest = 0
        self._opaque: set[str] = set()
        self._records: _Ranked[Tenant, SandboxRecord] = _Ranked(lambda one: (one.tenant,), lambda one: one.tenant)
        self._orders: _Ranked[HostId, Assignment] = _Ranked(
            lambda one: (-one.placement, one.host_id), lambda one: one.host_id
        )
        self._alive: set[HostId] = set()
        self._sources: dict[tuple[Tenant, Digest], set[HostId]] = {}
        self._sums = Sums()
        self._plain: dict[str, dict[Any, Any]] = {prefix: {} for prefix in _PLAIN}
        self._names: dict[tuple[Tenant, str], SandboxId] = {}
        self.touched: set[SandboxId] = set()
        self.stirred: set[HostId] = set()
        self.snapshot = Snapshot(
            records=self._records.best,
            names=self._names,
            assignments=self._orders.best,
            remnants=self._orders.others,
            statuses=self._plain[keyspace.STATUSES],
            refusals=self._plain[keyspace.REFUSALS],
            hosts=self._plain[keyspace.HOSTS],
            alive=self._alive,
            cordons=self._plain[keyspace.CORDONS],
            losses=self._plain[keyspace.LOSSES],
            reservations=self._plain[keyspace.RESERVATIONS],
            budgets=self._plain[keyspace.BUDGETS],
            balances=self._plain[keyspace.BALANCES],
            meters=self._plain[keyspace.METERS],
            charged=self._plain[keyspace.CHARGED],
            sources=self._sources,
            mod_revisions=self._mod_revisions,
            kept=self._sums,
        )

    def put(self, key: str, before: KeyValue | None, after: KeyValue | None) -> None:
        """`key` held `before` and holds `after` now."""
        if before is not None:
            self._digest -= _fingerprint(before)
        if after is not None:
            self._digest += _fingerprint(after)
            self._mod_revisions[key] = after.mod_revision
        else:
            self._mod_revisions.pop(key, None)
        if key == keyspace.PRICES:
            self._put_prices(after)
            return
        segments = key[len(ROOT) :].split("/")
        found = _PARSERS.get(segments[0])
        if found is not None and len(segments) == found[1] + 1:
            found[0](self, key, segments[1:], after)

    def advance(self, revision: int) -> Snapshot:
        """The snapshot, which is now the store at `revision`."""
        digest = f"{self._digest % (1 << DIGEST_BITS):064x}"
        self.snapshot = replace(self.snapshot, revision=revision, digest=digest)
        return self.snapshot

    def _decode(self, kind: type[V], entry: KeyValue | None) -> V | None:
        if entry is None:
            return None
        known: V | None = self._written.take(kind, entry)
        if known is not None:
            return known
        try:
            return decode(kind, entry.value)
        except BedplateError as error:
            log.warning("value.unreadable", key=entry.key, code=error.code, error=error.message)
            return None

    def _put_prices(self, entry: KeyValue | None) -> None:
        self.snapshot = replace(self.snapshot, prices=self._decode(Prices, entry) or Prices())

    def _put_record(self, key: str, segments: list[str], entry: KeyValue | None) -> None:
        tenant, sandbox_id = Tenant(segments[0]), SandboxId(segments[1])
        value = self._decode(SandboxRecord, entry)
        if value is not None and (value.tenant, value.sandbox_id) != (tenant, sandbox_id):
            log.warning("value.misplaced", key=key)
            value = None
        before = self._records.get(tenant, sandbox_id)
        self._records.put(tenant, sandbox_id, value)
        if before is not None:
            self._sums.count_record(before, -1)
        if value is not None:
            self._sums.count_record(value, 1)
        self._sums.check_accounts(self.snapshot, ((tenant, sandbox_account(sandbox_id)),))
        self._mark_opaque(key, is_opaque=entry is not None and value is None)
        self._touch(sandbox_id)

    def _put_assignment(self, key: str, segments: list[str], entry: KeyValue | None) -> None:
        host_id, sandbox_id = HostId(segments[0]), SandboxId(segments[1])
        value = self._decode(Assignment, entry)
        if value is not None and (value.host_id, value.sandbox_id) != (host_id, sandbox_id):
            log.warning("value.misplaced", key=key)
            value = None
        before = self._orders.get(host_id, sandbox_id)
        status = self.snapshot.statuses.get((host_id, sandbox_id))
        nothing = Reservation(host_id)
        held = set_aside(before, status) if before is not None else nothing
        self._orders.put(host_id, sandbox_id, value)
        if before is not None and (value is None or _payers(value) != _payers(before)):
            self._sums.shift(before, held, nothing)
            self._sums.set_paying(before, is_assigned=False)
            held = nothing
        if value is not None:
            self._sums.set_paying(value, is_assigned=True)
            self._sums.shift(value, held, set_aside(value, status))
        self._check_accounts(before, value)
        self._sums.set_assigned(host_id, sandbox_id, is_assigned=value is not None)
        self._mark_opaque(key, is_opaque=entry is not None and value is None)
        self._stir(host_id)
        self._touch(sandbox_id)

    def _put_status(self, key: str, segments: list[str], entry: KeyValue | None) -> None:
        host_id, sandbox_id = HostId(segments[0]), SandboxId(segments[1])
        order = self._orders.get(host_id, sandbox_id)
        before = self.snapshot.statuses.get((host_id, sandbox_id))
        self._put_plain(keyspace.STATUSES, (host_id, sandbox_id), key, entry)
        if order is not None:
            was = set_aside(order, before)
            held = set_aside(order, self.snapshot.statuses.get((host_id, sandbox_id)))
            if was != held:
                self._sums.shift(order, was, held)
                self._check_accounts(order)
                self._stir(host_id)
        self._touch(sandbox_id)

    def _put_refusal(self, key: str, segments: list[str], entry: KeyValue | None) -> None:
        self._put_plain(keyspace.REFUSALS, SandboxId(segments[0]), key, entry)
        self._touch(SandboxId(segments[0]))

    def _put_name(self, _key: str, segments: list[str], entry: KeyValue | None) -> None:
        name = (Tenant(segments[0]), segments[1])
        if entry is None:
            self._names.pop(name, None)
        else:
            self._names[name] = SandboxId(entry.value.decode("utf-8", "replace"))

    def _put_alive(self, _key: str, segments: list[str], entry: KeyValue | None) -> None:
        host_id = HostId(segments[0])
        is_news = (host_id in self._alive) != (entry is not None)
        (self._alive.discard if entry is None else self._alive.add)(host_id)
        self._stir(host_id)
        if is_news:
            self.touched |= self._sums.sandboxes_on.get(host_id, set())

    def _put_source(self, _key: str, segments: list[str], entry: KeyValue | None) -> None:
        source, host_id = (Tenant(segments[0]), Digest("sha256:" + segments[1])), HostId(segments[2])
        holders = self._sources.setdefault(source, set())
        (holders.discard if entry is None else holders.add)(host_id)
        if not holders:
            del self._sources[source]
        self._upkeep.stir_source(source)

    def _put_cordon(self, key: str, segments: list[str], entry: KeyValue | None) -> None:
        # A host is cordoned by the key: what cannot be read of it takes the reason away, not the cordon.
        host_id = HostId(segments[0])
        self._put_plain(keyspace.CORDONS, host_id, key, entry, absent=HostCordon(host_id, "", 0))
        self._stir(host_id)

    def _put_of_host(self, key: str, segments: list[str], entry: KeyValue | None) -> None:
        host_id, prefix = HostId(segments[0]), key[: -len(segments[0])]
        self._put_plain(prefix, host_id, key, entry)
        if prefix in (keyspace.METERS, keyspace.CHARGED):
            self._sums.check_meter(self.snapshot, host_id)
        else:
            self._stir(host_id)

    def _put_account(self, key: str, segments: list[str], entry: KeyValue | None) -> None:
        prefix = ROOT + key[len(ROOT) :].partition("/")[0] + "/"
        account = (Tenant(segments[0]), segments[1])
        self._put_plain(prefix, account, key, entry)
        self._sums.check_accounts(self.snapshot, (account,))

    def _check_accounts(self, *orders: Assignment | None) -> None:
        accounts = {account for order in orders if order is not None for account in _payers(order)}
        self._sums.check_accounts(self.snapshot, accounts)

    def _put_plain(self, prefix: str, name: Any, key: str, entry: KeyValue | None, *, absent: Any = None) -> None:
        values = self._plain[prefix]
        value: Any = self._decode(_PLAIN[prefix], entry)
        if value is not None and not key.endswith(f"/{getattr(value, 'host_id', name)}") and prefix in _OF_HOST:
            log.warning("value.misplaced", key=key)
            value = None
        value = absent if value is None and entry is not None else value
        if value is None:
            values.pop(name, None)
        else:
            values[name] = value

    def _touch(self, sandbox_id: SandboxId) -> None:
        record = self._records.best.get(sandbox_id)
        is_pending = record is not None and self.snapshot.is_pending(record)
        self._sums.set_pending(sandbox_id, is_pending=is_pending)
        self.touched.add(sandbox_id)

    def _stir(self, host_id: HostId) -> None:
        self._sums.check_host(self.snapshot, host_id)
        self.stirred.add(host_id)
        self._upkeep.stir(host_id)

    def _mark_opaque(self, key: str, *, is_opaque: bool) -> None:
        if is_opaque == (key in self._opaque):
            return
        (self._opaque.add if is_opaque else self._opaque.discard)(key)
        hosts, sandboxes = set(), set()
        for one in self._opaque:
            kind, owner, sandbox_id = one[len(ROOT) :].split("/")
            sandboxes.add(SandboxId(sandbox_id))
            if ROOT + kind + "/" == keyspace.ASSIGNMENTS:
                hosts.add(HostId(owner))
        moved = hosts ^ self.snapshot.opaque_hosts
        self.snapshot = replace(self.snapshot, opaque_sandboxes=frozenset(sandboxes), opaque_hosts=frozenset(hosts))
        for host_id in moved:
            self._stir(host_id)


def snapshot_of(entries: Iterable[KeyValue], revision: int) -> Snapshot:
    """A snapshot of its own, made from a listing of ROOT at `revision`."""
    contents = Contents()
    for entry in entries:
        contents.put(entry.key, None, entry)
    return contents.advance(revision)


class _Ranked(Generic[K, V]):
    """Values of which a sandbox has one, as a rule; of several the lowest by `rank` is the best, and the others are beside it."""

    def __init__(self, rank: Callable[[V], Any], where: Callable[[V], K]) -> None:
        self._rank = rank
        self._where = where
        self._places: dict[SandboxId, set[K]] = {}
        self.best: dict[SandboxId, V] = {}
        self.others: dict[tuple[K, SandboxId], V] = {}

    def get(self, where: K, sandbox_id: SandboxId) -> V | None:
        """The sandbox's value at that place."""
        found = self.best.get(sandbox_id)
        if found is not None and self._where(found) == where:
            return found
        return self.others.get((where, sandbox_id)) if self.others else None

    def put(self, where: K, sandbox_id: SandboxId, value: V | None) -> None:
        """The sandbox's value at that place is `value` now, or none."""
        found = self.best.get(sandbox_id)
        if sandbox_id not in self._places and (found is None or self._where(found) == where):
            if value is not None:
                self.best[sandbox_id] = value
            else:
                self.best.pop(sandbox_id, None)
            return
        values = [self.others.pop((place, sandbox_id)) for place in self._places.pop(sandbox_id, ())]
        values = [one for one in (*values, self.best.pop(sandbox_id, None)) if one is not None]
        values = sorted([one for one in values if self._where(one) != where], key=self._rank)
        if value is not None:
            values = sorted([*values, value], key=self._rank)
        for place, one in enumerate(values):
            if place == 0:
                self.best[sandbox_id] = one
            else:
                self.others[self._where(one), sandbox_id] = one
                self._places.setdefault(sandbox_id, set()).add(self._where(one))


def _payers(order: Assignment) -> set[tuple[Tenant, str]]:
    return {(order.tenant, account) for account in accounts_of(order)}


def _fingerprint(entry: KeyValue) -> int:
    content = b"%s\0%d\0%s" % (entry.key.encode(), entry.mod_revision, entry.value)
    return int.from_bytes(hashlib.sha256(content).digest(), "big")


# The kinds that are one decoded value for each key.
_PLAIN: Mapping[str, type] = {
    keyspace.STATUSES: SandboxStatus,
    keyspace.REFUSALS: Refusal,
    keyspace.HOSTS: HostRecord,
    keyspace.CORDONS: HostCordon,
    keyspace.LOSSES: HostLosses,
    keyspace.RESERVATIONS: Reservation,
    keyspace.BUDGETS: Budget,
    keyspace.BALANCES: Balance,
    keyspace.METERS: Meter,
    keyspace.CHARGED: Charged,
}
_Parser = Callable[[Contents, str, list[str], KeyValue | None], None]
# Those of which one host has one, which names itself in it.
_OF_HOST = frozenset({keyspace.HOSTS, keyspace.LOSSES, keyspace.METERS, keyspace.CHARGED})
# By the first segment below ROOT: what takes the key, and how many segments follow.
_PARSERS: Mapping[str, tuple[_Parser, int]] = {
    prefix[len(ROOT) : -1]: (parser, count)
    for prefix, parser, count in (
        (keyspace.RECORDS, Contents._put_record, 2),
        (keyspace.ASSIGNMENTS, Contents._put_assignment, 2),
        (keyspace.STATUSES, Contents._put_status, 2),
        (keyspace.REFUSALS, Contents._put_refusal, 1),
        (keyspace.NAMES, Contents._put_name, 2),
        (keyspace.ALIVE, Contents._put_alive, 1),
        (keyspace.SOURCES, Contents._put_source, 3),
        (keyspace.CORDONS, Contents._put_cordon, 1),
        (keyspace.HOSTS, Contents._put_of_host, 1),
        (keyspace.LOSSES, Contents._put_of_host, 1),
        (keyspace.RESERVATIONS, Contents._put_of_host, 1),
        (keyspace.METERS, Contents._put_of_host, 1),
        (keyspace.CHARGED, Contents._put_of_host, 1),
        (keyspace.BUDGETS, Contents._put_account, 2),
        (keyspace.BALANCES, Contents._put_account, 2),
    )
}
