"""Whatever the history of the store's keys was, what the scheduler has kept up is what a listing gives."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.codec import encode
from fleet.model.assignment import GpuShare
from fleet.model.budget import Balance, Budget, Charged, Meter, Prices
from fleet.model.host import Gpu, HostCordon, HostLosses, NumaNode, Reservation
from fleet.model.ids import NO_SANDBOX, HostId, Tenant
from fleet.model.sandbox import Amounts, Goal, Limits, Phase, Resources, Totals
from fleet.store import keyspace
from fleet.store.port import KeyValue
from scheduler.contents import Contents, snapshot_of
from scheduler.placement.demand import ANYWHERE, Wish, demand_of
from scheduler.placement.snapshot import Snapshot, Sums
from scheduler.placement.upkeep import ClusterUpkeep, cluster_of
from tests.unit.scheduler.build import DEMO, NOW_MS, OTHER, SOURCE, assignment, host, record, sandbox_id, spec, status

# A property of plans takes seconds of a processor.
pytestmark = pytest.mark.slow

HOSTS = [HostId("a"), HostId("b")]
DEVICES = (Gpu("g0", "A100", 40_960, is_shareable=True), Gpu("g1", "A100", 40_960, numa_node=1))
NODES = (NumaNode(0, 4, 4096), NumaNode(1, 4, 4096))
numbers, tenants, carriers = st.integers(0, 3), st.sampled_from([DEMO, OTHER]), st.sampled_from(HOSTS)
devices = st.lists(st.builds(GpuShare, st.sampled_from(["g0", "g1"]), st.integers(1, 1000)), max_size=2)
unreadable = st.sampled_from([b"\xff\xff", b""])


@st.composite
def of_sandboxes(draw: st.DrawFn) -> tuple[str, bytes]:
    """A record, an order, a status, a refusal or a name."""
    number, tenant, host_id = draw(numbers), draw(tenants), draw(carriers)
    parent = draw(st.sampled_from([NO_SANDBOX, sandbox_id(0)]))
    limits = Limits(total=Totals(wall_ms=draw(st.integers(0, 1))))
    wanted = spec(number, parent=parent, limits=limits)
    wish = replace(record(number), tenant=tenant, spec=wanted, goal=draw(st.sampled_from(Goal)))
    wish = replace(wish, run=draw(st.integers(1, 2)), placement=draw(st.integers(1, 2)))
    order = assignment(wish, host(host_id), gpus=tuple(draw(devices)), run=draw(st.integers(1, 2)))
    payers = draw(st.sampled_from([(), ("",), ("team", ""), (f"~{sandbox_id(0)}", "")]))
    order = replace(order, placement=draw(st.integers(1, 3)), numa_node=draw(st.integers(-1, 1)), accounts=payers)
    said = status(order, draw(st.sampled_from(Phase)), released=draw(st.booleans()))
    return draw(
        st.sampled_from(
            [
                (keyspace.record_key(tenant, wish.sandbox_id), encode(wish)),
                (keyspace.assignment_key(host_id, wish.sandbox_id), encode(order)),
                (keyspace.status_key(host_id, wish.sandbox_id), encode(said)),
                (keyspace.refusal_key(wish.sandbox_id), b""),
                (keyspace.name_key(tenant, wish.spec.name), wish.sandbox_id.encode()),
            ]
        )
    )


@st.composite
def of_hosts(draw: st.DrawFn) -> tuple[str, bytes]:
    """What there is by host."""
    host_id, amount = draw(carriers), draw(st.integers(0, 2))
    values: list[tuple[Callable[[HostId], str], Any]] = [
        (keyspace.host_key, host(host_id, gpus=DEVICES[:amount], numa_nodes=NODES[:amount])),
        (keyspace.cordon_key, HostCordon(host_id, "me", NOW_MS)),
        (keyspace.losses_key, HostLosses(host_id, (NOW_MS,), NOW_MS + amount)),
        (keyspace.reservation_key, Reservation(host_id, amount, 512 * amount, 1024 * amount, amount)),
        (keyspace.meter_key, Meter(host_id, amount, NOW_MS, ())),
        (keyspace.charged_key, Charged(host_id, amount, ())),
    ]
    key_of, value = draw(st.sampled_from(values))
    alive = (keyspace.alive_key(host_id), b"")
    source = (keyspace.source_key(DEMO, SOURCE.removeprefix("sha256:"), host_id), b"")
    return draw(st.sampled_from([(key_of(host_id), encode(value)), alive, source]))


@st.composite
def of_accounts(draw: st.DrawFn) -> tuple[str, bytes]:
    """What there is by account, the prices, and keys of which nothing is read."""
    account, tenant = draw(st.sampled_from(["", "team", f"~{sandbox_id(0)}"])), Tenant("demo")
    amounts = Amounts(vcpus=draw(st.integers(1, 3)))
    budget = Budget(tenant, account, "", Limits(amounts), "me", NOW_MS)
    return draw(
        st.sampled_from(
            [
                (keyspace.budget_key(tenant, account), encode(budget)),
                (keyspace.balance_key(tenant, account), encode(Balance(tenant, account, amounts))),
                (keyspace.PRICES, encode(Prices(amounts.vcpus))),
                (keyspace.LEADER, b"x"),
                (keyspace.ROOT + "future/thing", b"x"),
                (keyspace.RECORDS + "short", b"x"),
            ]
        )
    )


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, bytes | None]]:
    """Puts, deletes and values that cannot be read, in any order."""
    keys = draw(st.lists(st.one_of(of_sandboxes(), of_sandboxes(), of_hosts(), of_accounts()), max_size=30))
    made: list[tuple[str, bytes | None]] = []
    for key, value in keys:
        made.append((key, draw(st.one_of(st.just(value), st.just(value), unreadable))))
        if draw(st.integers(0, 2)) == 0:
            made.append((draw(st.sampled_from([one for one, _ in made])), None))
    return made


def plain(snapshot: Snapshot) -> dict[str, Any]:
    """All that a snapshot says; the sums by what they are."""
    said = {one.name: getattr(snapshot, one.name) for one in fields(snapshot) if one.name != "kept"}
    return said | {"sums": vars(snapshot.sums)}


@given(histories())
@settings(max_examples=300, deadline=None)
def test_what_is_kept_up_is_what_a_listing_gives(history: list[tuple[str, bytes | None]]) -> None:
    """After any history of puts, deletes and unreadable values: every mapping, every sum and the digest."""
    contents, entries = Contents(), dict[str, KeyValue]()
    for revision, (key, value) in enumerate(history, 1):
        before = entries.pop(key, None)
        if value is not None:
            entries[key] = KeyValue(key, value, before.create_revision if before else revision, revision)
        contents.put(key, before, entries.get(key))
    kept = contents.advance(len(history))
    assert plain(kept) == plain(snapshot_of([entries[key] for key in sorted(entries)], len(history)))


@given(histories())
@settings(max_examples=100, deadline=None)
def test_sums_are_what_they_say(history: list[tuple[str, bytes | None]]) -> None:
    """What is summed up while keys come and go is the sum over what there is, made in one go."""
    contents, entries = Contents(), dict[str, KeyValue]()
    for revision, (key, value) in enumerate(history, 1):
        before = entries.pop(key, None)
        # One tenant has one sandbox id: the id's key sees to that.
        if value is not None and f"/{OTHER}/" not in key:
            entries[key] = KeyValue(key, value, revision, revision)
        contents.put(key, before, entries.get(key))
    kept = contents.advance(len(history))
    assert vars(kept.sums) == vars(Sums.of(kept))
    assert kept.pending() == sorted(
        (one for one in kept.records.values() if kept.is_pending(one)),
        key=lambda one: (one.created_at_ms, one.sandbox_id),
    )


DEMANDS = [
    demand_of(spec(0)),
    demand_of(spec(0, resources=Resources(4, 4096, 4096))),
    demand_of(spec(0, resources=Resources(1, 512, 1024, gpus=1))),
    demand_of(spec(0, resources=Resources(1, 512, 1024, gpus=1, gpu_milli=500))),
]
WISHES = [ANYWHERE, Wish(DEMO, (SOURCE,)), Wish(OTHER, avoid_hosts=frozenset([HOSTS[0]]))]


@given(histories(), st.lists(st.integers(0, 2), max_size=30))
@settings(max_examples=200, deadline=None)
def test_the_kept_cluster_is_one_made_anew(history: list[tuple[str, bytes | None]], looks: list[int]) -> None:
    """However often it was brought up to date on the way, it chooses, refuses and explains as one made from the snapshot."""
    upkeep, entries = ClusterUpkeep(), dict[str, KeyValue]()
    contents, now_ms = Contents(upkeep=upkeep), NOW_MS
    for revision, (key, value) in enumerate(history, 1):
        before = entries.pop(key, None)
        if value is not None and f"/{OTHER}/" not in key:
            entries[key] = KeyValue(key, value, revision, revision)
        contents.put(key, before, entries.get(key))
        if revision < len(looks):
            now_ms += looks[revision]
            upkeep.refresh(contents.advance(revision), now_ms)
    kept, anew = upkeep.refresh(contents.advance(len(history)), now_ms), cluster_of(contents.snapshot, now_ms)
    for demand in DEMANDS:
        for wish in WISHES:
            assert kept.choose(demand, wish) == anew.choose(demand, wish)
            assert kept.explain(demand, wish) == anew.explain(demand, wish)


@given(histories())
@settings(max_examples=100, deadline=None)
def test_the_digest_tells_contents_apart(history: list[tuple[str, bytes | None]]) -> None:
    """The same keys give the same digest in any order; one value or revision that differs gives another."""
    entries = {
        key: KeyValue(key, value, 1, place + 1) for place, (key, value) in enumerate(history) if value is not None
    }
    listed = [entries[key] for key in sorted(entries)]
    told = snapshot_of(listed, 1).digest
    assert snapshot_of(listed[::-1], 1).digest == told
    for place, one in enumerate(listed):
        for other in (replace(one, value=one.value + b"x"), replace(one, mod_revision=one.mod_revision + 1)):
            assert snapshot_of([*listed[:place], other, *listed[place + 1 :]], 1).digest != told
