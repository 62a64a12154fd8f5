"""Each term of a score prefers the host that it is there to prefer, all else being equal."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.errors import InvalidSpecError
from fleet.model.assignment import GpuShare
from fleet.model.host import Capacity, Gpu, HostImage, HostLosses, NumaNode, Reservation
from fleet.model.ids import HostId
from fleet.model.sandbox import Affinity, ImageRef, Label
from scheduler.placement.cluster import Choice, Cluster
from scheduler.placement.columns import STALE_MAX
from scheduler.placement.demand import Demand, Shape, Wish
from scheduler.placement.hosts import HostView, Share
from scheduler.placement.weights import WEIGHT_MAX, Weights
from tests.unit.scheduler.build import BASE, DEMO, SOURCE, host

SMALL = Demand(1000, 256)
ROOM = Capacity(16, 65_536, 65_536, 64)
RACK = Label("rack", "r1")
PARENT = HostId("parent")


def view(name: str, **changes: Any) -> HostView:
    made = HostView(host(name, capacity=ROOM))
    own = {key: changes.pop(key) for key in list(changes) if key in HostView.__slots__}
    return replace(made, record=replace(made.record, **changes), **own)


def gpus(switches: str, *, nodes: str = "", is_shareable: bool = True) -> tuple[Gpu, ...]:
    """One device for each letter, behind the switch of that name."""
    return tuple(
        Gpu(f"gpu-{slot}", "A100", 40_960, int(nodes[slot]) if nodes else -1, switch, is_shareable)
        for slot, switch in enumerate(switches)
    )


def used(name: str, **amounts: Any) -> Reservation:
    return Reservation(HostId(name), **amounts)


def choose(views: list[HostView], demand: Demand = SMALL, wish: Wish | None = None, **weights: int) -> Choice:
    cluster = Cluster(Weights(**weights))
    for one in views:
        cluster.upsert_host(one)
    cluster.set_holders(DEMO, SOURCE, {HostId("b")})
    choice = cluster.choose(demand, wish or Wish())
    assert choice is not None
    return choice


PREFERRED = [
    ("the first of equals", [view("b"), view("a")], SMALL, Wish(), "a"),
    ("the fuller one", [view("a"), view("b", reserved=used("b", vcpus=4))], SMALL, Wish(), "b"),
    ("its sources", [view("a"), view("b")], SMALL, Wish(tenant=DEMO, sources=(SOURCE,)), "b"),
    (
        "preferred labels",
        [view("a"), view("b", labels=(Label("zone", "z"),))],
        replace(SMALL, prefer_labels=(Label("zone", "z"),)),
        Wish(),
        "b",
    ),
    (
        "its parent's host",
        [view("a", labels=(RACK,)), view("parent", labels=(RACK,))],
        SMALL,
        Wish(affinity=Affinity.NEAR, parent_host=PARENT, parent_rack="r1"),
        "parent",
    ),
    (
        "its parent's rack",
        [view("a"), view("b", labels=(RACK,))],
        SMALL,
        Wish(affinity=Affinity.NEAR, parent_host=PARENT, parent_rack="r1"),
        "b",
    ),
    (
        "another rack than its parent's",
        [view("a", labels=(RACK,)), view("b")],
        SMALL,
        Wish(affinity=Affinity.AWAY, parent_host=PARENT, parent_rack="r1"),
        "b",
    ),
    ("few of its tenant", [view("a", tenant_counts={DEMO: 9}), view("b")], SMALL, Wish(tenant=DEMO), "b"),
    ("no losses", [view("a", losses=HostLosses(HostId("a"), (1, 2), 3)), view("b")], SMALL, Wish(), "b"),
    (
        "a NUMA node that holds it",
        [view("a", numa_nodes=(NumaNode(0, 2, 9_000), NumaNode(1, 2, 9_000))), view("b")],
        Demand(3000, 256),
        Wish(),
        "b",
    ),
    (
        "one PCIe switch",
        [view("a", gpus=gpus("xyxy")), view("b", gpus=gpus("xxyz"))],
        Demand(1000, 256, gpus=2),
        Wish(),
        "a",
    ),
    ("a host without devices", [view("a", gpus=gpus("x")), view("b")], Demand(8000, 256), Wish(), "b"),
    (
        "the broken device",
        [view("a", gpus=gpus("x")), view("b", gpus=gpus("x"), reserved=used("b", gpus=(GpuShare("gpu-0", 500),)))],
        Demand(1000, 256, gpus=1, gpu_milli=500),
        Wish(),
        "b",
    ),
]


@pytest.mark.parametrize(("_what", "views", "demand", "wish", "best"), PREFERRED, ids=[case[0] for case in PREFERRED])
def test_a_term_prefers(_what: str, views: list[HostView], demand: Demand, wish: Wish, best: str) -> None:
    """With the default weights, the host that the term is for is chosen over one that is alike but for it."""
    assert choose(views, demand, wish).host_id == best


def test_a_weight_of_nothing_switches_a_term_off() -> None:
    """Then the first host by its id is as good as the one that the term would prefer."""
    views = [view("a"), view("b")]
    wish = Wish(tenant=DEMO, sources=(SOURCE,))
    assert choose(views, SMALL, wish, source_locality=0).host_id == "a"


@pytest.mark.parametrize("value", [-1, WEIGHT_MAX + 1])
def test_weights_have_bounds(value: int) -> None:
    """A weight that could make sums overflow, or reward what a term counts against, is refused by its name."""
    with pytest.raises(InvalidSpecError) as refused:
        Weights(balance=value)
    assert refused.value.field == "weights.balance"


def test_whole_devices_come_from_one_switch_or_node() -> None:
    """The switch with the fewest free devices that suffice; where none does, the NUMA node."""
    beside = view("a", gpus=gpus("xxxyy", nodes="00011"))
    assert [one.device_id for one in choose([beside], Demand(1000, 256, gpus=2)).gpus] == ["gpu-3", "gpu-4"]
    assert [one.device_id for one in choose([beside], Demand(1000, 256, gpus=3)).gpus] == ["gpu-0", "gpu-1", "gpu-2"]
    apart = view("a", gpus=gpus("pqrst", nodes="01010"))
    assert [one.device_id for one in choose([apart], Demand(1000, 256, gpus=2)).gpus] == ["gpu-1", "gpu-3"]


def test_parts_fill_what_is_broken_already() -> None:
    """A part goes where it leaves the most for the shapes to come: into the device that fits it exactly."""
    taken = (GpuShare("gpu-0", 400), GpuShare("gpu-1", 500))
    half = view("a", gpus=gpus("xyz"), reserved=used("a", gpus=taken))
    cluster = Cluster()
    cluster.upsert_host(half)
    cluster.set_popularity([(Shape(1000, 256, 1, 500), 1), (Shape(1000, 256, 1, 600), 1), (Shape(1000, 256, 1), 1)])
    choice = cluster.choose(Demand(1000, 256, gpus=1, gpu_milli=500))
    assert choice is not None
    assert choice.gpus == (GpuShare("gpu-1", 500),)


def test_memory_and_node_of_a_choice_are_its_share() -> None:
    """What a choice would take names the VMM's memory, and the NUMA node beside its devices."""
    nodes = (NumaNode(0, 8, 32_768), NumaNode(1, 8, 32_768))
    choice = choose(
        [view("a", gpus=gpus("xy", nodes="01"), numa_nodes=nodes)], Demand(1000, 256, gpus=1), Wish(tenant=DEMO)
    )
    assert (choice.numa_node, choice.gpus) == (0, (GpuShare("gpu-0", 1000),))
    assert choice.share == Share(1000, 256 + 192 + 8, 0, 1, choice.gpus, 0, DEMO)


def test_marks_are_void_after_a_host_has_changed() -> None:
    """What was taken up anew from the store cannot be undone, and saying so is better than undoing half."""
    cluster = Cluster()
    cluster.upsert_host(view("a"))
    mark = cluster.mark()
    cluster.take(HostId("a"), Share(1000))
    cluster.upsert_host(view("a"))
    with pytest.raises(ValueError, match="void"):
        cluster.rollback(mark)


def test_values_of_hosts_as_they_were_are_forgotten() -> None:
    """A host whose images change for years costs no more memory than one that is new, and is chosen as that is."""
    cluster = Cluster()
    for number in range(STALE_MAX + 50):
        images = (HostImage(f"image-{number}:latest", BASE),)
        cluster.upsert_host(view("a", images=images))
        found = cluster.choose(replace(SMALL, image=ImageRef(f"image-{number}:latest"))) if number % 500 == 0 else None
        assert number % 500 or found is not None
    assert len(cluster._hosts.images.values) <= STALE_MAX
    assert cluster.choose(replace(SMALL, image=ImageRef(f"image-{STALE_MAX + 49}:latest"))) is not None
    assert cluster.choose(replace(SMALL, image=ImageRef("image-7:latest"))) is None
