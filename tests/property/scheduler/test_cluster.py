"""What holds for every choice of a cluster, whatever its hosts look like and whatever was taken before."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.model.assignment import ANY_NODE
from fleet.model.host import Accelerator, Capacity, Gpu, HostImage, HostLosses, NumaNode, Reservation
from fleet.model.ids import NO_HOST, Digest, HostId, Tenant
from fleet.model.sandbox import Affinity, ImageRef, Label, NetworkMode
from scheduler.placement.cluster import Choice, Cluster
from scheduler.placement.demand import DEVICE_MILLI, Demand, Shape, Wish, shape_of
from scheduler.placement.hosts import HostView, Share
from scheduler.placement.rows import BLOCK, held_digest
from tests.unit.scheduler.build import BASE, DEMO, OTHER, SOURCE, host

# A property of plans takes seconds of a processor.
pytestmark = pytest.mark.slow

OTHER_DIGEST = Digest("sha256:" + "c" * 64)
NAMES = tuple(HostId(f"h{number}") for number in range(6))
LABELS = (Label("disk", "nvme"), Label("rack", "r1"), Label("rack", "r2"))
TAINTS = (Label("for", "training"), Label("beta", ""))

gpus = st.builds(
    Gpu,
    device_id=st.just(""),
    model=st.sampled_from(["A", "B"]),
    memory_mib=st.sampled_from([16_000, 80_000]),
    numa_node=st.integers(-1, 1),
    pcie_switch=st.sampled_from(["", "s0", "s1"]),
    is_shareable=st.booleans(),
)


def named(devices: list[Gpu]) -> tuple[Gpu, ...]:
    return tuple(replace(gpu, device_id=f"0000:0{slot}:00.0") for slot, gpu in enumerate(devices))


records = st.builds(
    host,
    name=st.sampled_from(NAMES),
    capacity=st.builds(
        Capacity,
        vcpus=st.integers(0, 8),
        memory_mib=st.integers(0, 4000),
        disk_mib=st.integers(0, 1500),
        sandboxes=st.integers(0, 4),
    ),
    labels=st.sets(st.sampled_from(LABELS)).map(lambda labels: tuple(sorted(labels, key=repr))),
    taints=st.one_of(st.just(()), st.sets(st.sampled_from(TAINTS), max_size=1).map(tuple)),
    images=st.sampled_from([(HostImage("base:latest", BASE),), (HostImage("base:latest", OTHER_DIGEST),), ()]),
    accelerator=st.sampled_from(list(Accelerator)),
    network_modes=st.sampled_from([(NetworkMode.NONE, NetworkMode.CLOSED), (NetworkMode.NONE,)]),
    vcpu_overcommit_milli=st.sampled_from([1000, 1500]),
    gpus=st.lists(gpus, max_size=4).map(named),
    numa_nodes=st.sampled_from([(), (NumaNode(0, 4, 2000), NumaNode(1, 4, 2000)), (NumaNode(0, 8, 4000),)]),
)
views = st.builds(
    HostView,
    record=records,
    is_alive=st.sampled_from([True, True, True, False]),
    is_readable=st.sampled_from([True, True, True, False]),
    is_cordoned=st.sampled_from([False, False, False, True]),
    is_backing_off=st.sampled_from([False, False, False, True]),
    reserved=st.none(),
    tenant_counts=st.dictionaries(st.sampled_from([DEMO, OTHER]), st.integers(1, 3)),
    losses=st.sampled_from([None, HostLosses(HostId(""), (1, 2), 0)]),
)
demands = st.builds(
    Demand,
    vcpu_milli=st.sampled_from([500, 1000, 2000, 4000]),
    memory_mib=st.sampled_from([256, 512, 1024]),
    disk_mib=st.sampled_from([0, 64, 512]),
    gpus=st.sampled_from([0, 0, 1, 1, 2, 3]),
    gpu_milli=st.sampled_from([250, 500, 1000]),
    gpu_models=st.sampled_from([(), (), ("A",), ("A", "B")]),
    gpu_memory_mib=st.sampled_from([0, 0, 40_000]),
    labels=st.sets(st.sampled_from(LABELS), max_size=1).map(tuple),
    tolerations=st.sets(st.sampled_from(TAINTS)).map(tuple),
    prefer_labels=st.sets(st.sampled_from(LABELS), max_size=1).map(tuple),
    network_mode=st.sampled_from([NetworkMode.NONE, NetworkMode.CLOSED]),
    image=st.sampled_from([ImageRef(), ImageRef("base:latest", BASE)]),
)
wishes = st.builds(
    Wish,
    tenant=st.sampled_from([Tenant(""), DEMO, OTHER]),
    sources=st.sampled_from([(), (SOURCE,), (SOURCE, OTHER_DIGEST)]),
    affinity=st.sampled_from(list(Affinity)),
    parent_host=st.sampled_from([NO_HOST, *NAMES]),
    parent_rack=st.sampled_from(["", "r1"]),
    avoid_hosts=st.sets(st.sampled_from(NAMES), max_size=2).map(frozenset),
    pinned_host=st.sampled_from([NO_HOST, NO_HOST, NO_HOST, *NAMES]),
)
fleets = st.lists(views, max_size=6, unique_by=lambda view: view.record.host_id)
popularities = st.lists(st.tuples(demands.map(shape_of), st.integers(1, 5)), max_size=4)


def cluster_of(fleet: Iterable[HostView], popularity: list[tuple[Shape, int]]) -> Cluster:
    cluster = Cluster()
    cluster.set_popularity(popularity)
    for view in fleet:
        cluster.upsert_host(view)
    cluster.set_holders(DEMO, SOURCE, set(NAMES[:2]))
    return cluster


@dataclass
class Account:
    """One host's truth, kept by hand in plain Python."""

    view: HostView
    taken: list[Share] = field(default_factory=list)

    def used(self, amount: str) -> int:
        return sum(getattr(share, amount) for share in self.taken)

    def device_free(self, gpu: Gpu) -> int:
        return DEVICE_MILLI - sum(
            one.milli for share in self.taken for one in share.gpus if one.device_id == gpu.device_id
        )

    def can_carry(self, demand: Demand, wish: Wish) -> bool:
        """Every condition, written down once more without arrays."""
        view, record = self.view, self.view.record
        is_open = view.is_alive and view.is_readable and not view.is_cordoned and not view.is_backing_off
        is_meant = record.host_id not in wish.avoid_hosts and wish.pinned_host in (NO_HOST, record.host_id)
        is_apt = (
            set(demand.labels) <= set(record.labels)
            and set(record.taints) <= set(demand.tolerations)
            and demand.network_mode in record.network_modes
            and bool(held_digest(demand.image, record.images))
        )
        return is_open and is_meant and is_apt and self.has_room(demand)

    def has_room(self, demand: Demand) -> bool:
        record, capacity = self.view.record, self.view.record.capacity
        able = [
            gpu
            for gpu in record.gpus
            if self.device_free(gpu) >= demand.gpu_milli
            and (not demand.gpu_models or gpu.model in demand.gpu_models)
            and gpu.memory_mib >= demand.gpu_memory_mib
            and (gpu.is_shareable or demand.gpu_milli == DEVICE_MILLI)
        ]
        return (
            capacity.vcpus * record.vcpu_overcommit_milli - self.used("vcpu_milli") >= demand.vcpu_milli
            and capacity.memory_mib - self.used("memory_mib") >= demand.memory_on(record.accelerator)
            and capacity.disk_mib - self.used("disk_mib") >= demand.disk_mib
            and capacity.sandboxes - self.used("sandboxes") >= 1
            and len(able) >= demand.gpus
        )


def check_choice(account: Account, demand: Demand, choice: Choice) -> None:
    """What a choice takes is what was asked for, of devices that can give it, on a node that is there."""
    devices = {gpu.device_id: gpu for gpu in account.view.record.gpus}
    assert len({one.device_id for one in choice.gpus}) == len(choice.gpus) == demand.gpus
    for one in choice.gpus:
        assert one.milli == demand.gpu_milli
        assert account.device_free(devices[one.device_id]) >= one.milli
        assert not demand.gpu_models or devices[one.device_id].model in demand.gpu_models
    nodes = {node.node for node in account.view.record.numa_nodes}
    assert choice.numa_node == ANY_NODE or choice.numa_node in nodes
    assert choice.share.memory_mib == demand.memory_on(account.view.record.accelerator)


@given(fleets, popularities, st.lists(st.tuples(demands, wishes, st.booleans()), max_size=8))
def test_choices_and_refusals_are_what_brute_force_says(
    fleet: list[HostView], popularity: list[tuple[Shape, int]], asked: list[tuple[Demand, Wish, bool]]
) -> None:
    """A host is chosen exactly if one can carry it, it is one that can, and nothing is given away twice; refusals count all."""
    cluster = cluster_of(fleet, popularity)
    accounts = {view.record.host_id: Account(view) for view in fleet}
    for demand, wish, gives_back in asked:
        able = {host_id for host_id, account in accounts.items() if account.can_carry(demand, wish)}
        choice = cluster.choose(demand, wish)
        explanation = cluster.explain(demand, wish)
        assert explanation.able == len(able)
        if choice is None:
            assert able == set()
            reasons = cluster.refuse(demand, wish)
            assert sum(reason.hosts for reason in reasons) == cluster.considered(wish)
            assert explanation.reasons == reasons
            continue
        assert choice.host_id in able
        assert explanation.ranking[0].host_id == choice.host_id
        assert {one.score for one in explanation.ranking[:1]} == {choice.score}
        for ranked in explanation.ranking:
            assert sum(term.value for term in ranked.terms) == ranked.score
        account = accounts[choice.host_id]
        check_choice(account, demand, choice)
        cluster.take(choice.host_id, choice.share)
        account.taken.append(choice.share)
        if gives_back:
            cluster.give_back(choice.host_id, account.taken.pop(0))


@given(fleets, popularities, st.lists(st.tuples(demands, wishes), min_size=1, max_size=8), st.data())
def test_a_cached_choice_is_a_fresh_one(
    fleet: list[HostView], popularity: list[tuple[Shape, int]], asked: list[tuple[Demand, Wish]], data: st.DataObject
) -> None:
    """Rows that were caught up over takes, rollbacks and changed hosts choose as a cluster that is built anew, in any order."""
    cluster = cluster_of(fleet, popularity)
    state = {view.record.host_id: view for view in fleet}
    taken: list[tuple[HostId, Share]] = []
    for demand, wish in asked:
        step = data.draw(st.sampled_from(["take", "undo", "change", "renew", "remove", "look"]))
        if step == "change":
            view = data.draw(views)
            state[view.record.host_id] = view
            taken = [one for one in taken if one[0] != view.record.host_id]
            cluster.upsert_host(view)
        elif step == "renew" and state:
            host_id = data.draw(st.sampled_from(sorted(state)))
            counts = data.draw(st.dictionaries(st.just(DEMO), st.integers(1, 2)))
            used = Reservation(host_id, data.draw(st.integers(0, 2)), 256)
            is_cordoned = data.draw(st.booleans())
            state[host_id] = replace(state[host_id], is_cordoned=is_cordoned, reserved=used, tenant_counts=counts)
            taken = [one for one in taken if one[0] != host_id]
            cluster.upsert_host(state[host_id])
        elif step == "remove" and state:
            host_id = data.draw(st.sampled_from(sorted(state)))
            del state[host_id]
            taken = [one for one in taken if one[0] != host_id]
            cluster.remove_host(host_id)
        mark = cluster.mark()
        choice = cluster.choose(demand, wish)
        order = data.draw(st.permutations(list(state.values())))
        fresh = cluster_of(order, popularity)
        for host_id, share in taken:
            fresh.take(host_id, share)
        assert choice == fresh.choose(demand, wish)
        assert cluster.refuse(demand, wish) == fresh.refuse(demand, wish)
        assert cluster.explain(demand, wish) == fresh.explain(demand, wish)
        if choice is not None and step in ("take", "undo"):
            cluster.take(choice.host_id, choice.share)
            cluster.choose(demand, wish)
            taken.append((choice.host_id, choice.share))
        if choice is not None and step == "undo":
            cluster.rollback(mark)
            taken.pop()
        else:
            cluster.keep(mark)


@given(fleets, demands, wishes)
def test_what_is_reserved_is_as_good_as_taken(fleet: list[HostView], demand: Demand, wish: Wish) -> None:
    """A host that is taken up with its reservation is the host on which the same was taken."""
    taken = cluster_of(fleet, [])
    choice = taken.choose(demand, replace(wish, tenant=Tenant("")))
    if choice is None or choice.share.vcpu_milli % 1000 or choice.numa_node != ANY_NODE:
        return
    taken.take(choice.host_id, choice.share)
    share = choice.share
    reservation = Reservation(
        choice.host_id,
        share.vcpu_milli // 1000,
        share.memory_mib,
        share.disk_mib,
        1,
        share.gpus,
    )
    reserved = cluster_of(
        [replace(view, reserved=reservation) if view.record.host_id == choice.host_id else view for view in fleet], []
    )
    assert taken.choose(demand, wish) == reserved.choose(demand, wish)


@given(
    st.lists(views, min_size=1, max_size=5),
    popularities,
    st.lists(st.tuples(demands, wishes), max_size=6),
    st.randoms(),
)
def test_the_best_of_many_is_found(
    kinds: list[HostView], popularity: list[tuple[Shape, int]], asked: list[tuple[Demand, Wish]], chance: Random
) -> None:
    """Looking at blocks, and at hosts that gain, finds the host that a look at every one of them finds."""
    names = [HostId(f"h{number}") for number in range(BLOCK * 5 // 2)]
    fleet = [chance.choice(kinds) for _ in names]
    views_of = [
        replace(view, record=replace(view.record, host_id=name)) for name, view in zip(names, fleet, strict=True)
    ]
    cluster = cluster_of(views_of, popularity)
    cluster.set_holders(DEMO, SOURCE, set(chance.sample(names, 9)))
    for demand, wish in asked:
        for _ in range(3):
            choice = cluster.choose(demand, wish)
            ranking = cluster.explain(demand, wish, 1).ranking
            assert (choice and choice.host_id) == (ranking[0].host_id if ranking else None)
            if choice is not None:
                cluster.take(choice.host_id, choice.share)
