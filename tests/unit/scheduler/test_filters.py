"""Each filter excludes exactly the hosts it names, and says why."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.model.assignment import GpuShare, RefusalReason
from fleet.model.host import Accelerator, Capacity, Gpu, HostImage, Reservation
from fleet.model.ids import NO_DIGEST, Digest, HostId
from fleet.model.sandbox import ImageRef, Label, Network, NetworkMode, Resources, SandboxSpec
from scheduler.placement.cluster import Cluster
from scheduler.placement.demand import Demand, Wish, demand_of
from scheduler.placement.hosts import HostView
from scheduler.placement.refusals import FILTERS, HOST_UNKNOWN, NO_HOSTS
from scheduler.placement.rows import held_digest
from tests.unit.scheduler.build import BASE, ROOMY, host, spec

OTHER_DIGEST = Digest("sha256:" + "c" * 64)
GOLD = Label("disk", "nvme")
TRAINING = Label("for", "training")
A100 = Gpu("0000:01:00.0", "A100", 40_960)
SHARED = replace(A100, is_shareable=True)


def candidate(free: Capacity = ROOMY, **changes: Any) -> HostView:
    """A host of which just `free` is left."""
    made = replace(HostView(host()), **changes)
    whole = made.record.capacity
    taken = Reservation(
        made.record.host_id,
        whole.vcpus - free.vcpus,
        whole.memory_mib - free.memory_mib,
        whole.disk_mib - free.disk_mib,
        whole.sandboxes - free.sandboxes,
        made.reserved.gpus if made.reserved is not None else (),
    )
    return replace(made, reserved=taken)


def refuse(wanted: SandboxSpec | Demand, views: list[HostView], wish: Wish | None = None) -> tuple[RefusalReason, ...]:
    """The reasons of a cluster of these hosts, each under an id of its own."""
    cluster = Cluster()
    for number, view in enumerate(views):
        host_id = HostId(f"{view.record.host_id}-{number}")
        cluster.upsert_host(replace(view, record=replace(view.record, host_id=host_id)))
    demand = demand_of(wanted) if isinstance(wanted, SandboxSpec) else wanted
    assert cluster.choose(demand, wish or Wish()) is None
    return cluster.refuse(demand, wish or Wish())


ABLE = candidate(
    is_alive=False,
    record=host(
        "able",
        labels=(GOLD,),
        images=tuple(
            HostImage(name, digest) for name in ("base:latest", "gone:latest") for digest in (BASE, OTHER_DIGEST)
        ),
    ),
)

EXCLUDED = [
    ("readable", spec(), candidate(is_readable=False), "carries an order that this scheduler's version cannot read"),
    ("alive", spec(), candidate(is_alive=False), "not alive"),
    ("cordoned", spec(), candidate(is_cordoned=True), "an operator lets nothing new onto it"),
    ("labels", spec(require_labels=(GOLD,)), candidate(), "the labels disk=nvme are not all there"),
    (
        "labels",
        spec(require_labels=(GOLD,)),
        candidate(record=host(labels=(Label("disk", "hdd"),))),
        "the labels disk=nvme are not all there",
    ),
    (
        "network_mode",
        spec(),
        candidate(record=host(network_modes=(NetworkMode.NONE,))),
        "network mode closed is not offered",
    ),
    ("image", spec(image=ImageRef("gone:latest")), candidate(), "image gone:latest is not held"),
    (
        "image",
        spec(image=ImageRef("base:latest", OTHER_DIGEST)),
        candidate(),
        f"image base:latest with digest {OTHER_DIGEST} is not held",
    ),
    ("sandboxes", spec(), candidate(replace(ROOMY, sandboxes=0)), "carries as many sandboxes as it may"),
    ("vcpu", spec(), candidate(replace(ROOMY, vcpus=0)), "needs 1 vCPUs, at most 0 are free"),
    (
        "memory",
        spec(),
        candidate(replace(ROOMY, memory_mib=711)),
        "needs 712 MiB of memory, at most 711 are free",
    ),
    ("disk", spec(), candidate(replace(ROOMY, disk_mib=-5)), "needs 1024 MiB of disk, at most 0 are free"),
]


@pytest.mark.parametrize(("code", "wanted", "excluded", "message"), EXCLUDED)
def test_a_filter_excludes_and_explains(code: str, wanted: Any, excluded: HostView, message: str) -> None:
    """The host is excluded by the filter of that code, and the refusal says in one sentence what is missing."""
    # Beside one that could carry all of these if it were alive: waiting for that one is not in vain.
    own = RefusalReason(code, 1, message)
    away = RefusalReason("alive", 1, "not alive")
    assert set(refuse(wanted, [excluded, ABLE])) == ({own, away} if code != "alive" else {replace(own, hosts=2)})


HOPELESS = [
    ("labels_unknown", spec(require_labels=(GOLD,)), "no host has the labels disk=nvme"),
    ("network_mode_unknown", spec(network=Network(NetworkMode.BRIDGED)), "no host offers network mode bridged"),
    ("image_unknown", spec(image=ImageRef("gone:1")), "no host has image gone:1; known: base:latest, node:22"),
    (
        "image_unknown",
        spec(image=ImageRef("node:22", BASE)),
        f"no host has image node:22 with digest {BASE}; known: base:latest, node:22",
    ),
    (
        "vcpu_too_large",
        spec(resources=Resources(vcpus=9, memory_mib=512, disk_mib=1024)),
        "needs 9 vCPUs, no host has more than 8",
    ),
    (
        "memory_too_large",
        spec(resources=Resources(vcpus=1, memory_mib=8192, disk_mib=1024)),
        "needs 8392 MiB of memory, no host has more than 8192",
    ),
    (
        "disk_too_large",
        spec(resources=Resources(vcpus=1, memory_mib=512, disk_mib=8193)),
        "needs 8193 MiB of disk, no host has more than 8192",
    ),
]


@pytest.mark.parametrize(("code", "wanted", "message"), HOPELESS, ids=[case[0] for case in HOPELESS])
def test_what_no_host_can_ever_carry_is_told_as_such(code: str, wanted: SandboxSpec, message: str) -> None:
    """One reason for all hosts, whether they are dead, full or cordoned now: waiting for any of that to pass is in vain."""
    other = host("two", images=(HostImage("node:22", OTHER_DIGEST),))
    full = candidate(Capacity(0, 0, 0, 0))
    fleet = [full, candidate(is_alive=False), HostView(other, is_cordoned=True)]
    assert refuse(wanted, fleet) == (RefusalReason(code, 3, message),)


def test_one_host_that_could_is_hope() -> None:
    """As long as one host could carry it when empty, the reasons are counted as ever."""
    full = candidate(Capacity(0, 0, 0, 0))
    without = candidate(record=host("two", images=()))
    assert [reason.code for reason in refuse(spec(), [full, without])] == ["image", "sandboxes"]


def test_what_fits_exactly_passes() -> None:
    """A host with precisely what is needed, the VMM's overhead included, can carry the sandbox."""
    cluster = Cluster()
    cluster.upsert_host(candidate(Capacity(vcpus=1, memory_mib=712, disk_mib=1024, sandboxes=1)))
    choice = cluster.choose(demand_of(spec()))
    assert choice is not None
    assert choice.share.memory_mib == 712


def test_emulation_needs_more_memory() -> None:
    """On a TCG host the translation buffer counts as well."""
    emulated = candidate(replace(ROOMY, memory_mib=712), record=host(accelerator=Accelerator.TCG))
    assert [reason.code for reason in refuse(spec(), [emulated])] == ["memory"]


def test_a_host_counts_once_under_its_first_filter() -> None:
    """Counts add up to the hosts considered, and come in the order of FILTERS."""
    away_and_full = candidate(Capacity(0, 0, 0, 0), is_alive=False)
    full = candidate(Capacity(0, 0, 0, 0))
    narrow = candidate(replace(ROOMY, memory_mib=100))
    narrower = candidate(replace(ROOMY, memory_mib=50))
    reasons = refuse(spec(), [narrower, full, away_and_full, narrow])
    assert [(reason.code, reason.hosts) for reason in reasons] == [("alive", 1), ("sandboxes", 1), ("memory", 2)]
    assert reasons[-1].message == "needs 712 MiB of memory, at most 100 are free"


def test_no_host_at_all_is_a_reason() -> None:
    """Without any host, or without the one that has the disk, the refusal says so instead of staying silent."""
    assert refuse(spec(), []) == (NO_HOSTS,)
    assert refuse(spec(), [candidate()], Wish(pinned_host=HostId("gone"))) == (HOST_UNKNOWN,)


def test_the_order_of_filters_is_stable() -> None:
    """The documented order, which decides under which reason a host is counted."""
    order = ["readable", "alive", "cordoned", "backing_off", "leaving", "taints", "labels", "network_mode", "image"]
    assert [one.code for one in FILTERS] == [*order, "sandboxes", "vcpu", "memory", "disk", "gpu_model", "gpu"]


@pytest.mark.parametrize(
    ("image", "resolved"),
    [
        (ImageRef("base:latest"), BASE),
        (ImageRef("base:latest", BASE), BASE),
        (ImageRef("base:latest", OTHER_DIGEST), NO_DIGEST),
        (ImageRef("old:1"), OTHER_DIGEST),
        (ImageRef("none:1"), NO_DIGEST),
    ],
)
def test_an_image_resolves_per_host(image: ImageRef, resolved: Digest) -> None:
    """A name stands for the digest that this host holds under it; a pinned digest for itself or nothing."""
    holder = host(images=(HostImage("base:latest", BASE), HostImage("old:1", OTHER_DIGEST)))
    assert held_digest(image, holder.images) == resolved


GPUS = [
    ("leaving", Demand(1000, 256), candidate(), "an earlier placement of it is still being removed there"),
    (
        "backing_off",
        Demand(1000, 256),
        candidate(is_backing_off=True),
        "was lost of late, and waits before it takes anything new",
    ),
    ("taints", Demand(1000, 256), candidate(record=host(taints=(TRAINING,))), "kept for what tolerates for=training"),
    (
        "gpu_unknown",
        Demand(1000, 256, gpus=1, gpu_models=("H100",)),
        candidate(record=host(gpus=(A100,))),
        "no host has 1 H100 GPU; known models: A100",
    ),
    (
        "gpu_unknown",
        Demand(1000, 256, gpus=1, gpu_milli=500),
        candidate(record=host(gpus=(A100,))),
        "no host has 1 GPU, 500 thousandths of each; known models: A100",
    ),
    (
        "gpu",
        Demand(1000, 256, gpus=1),
        candidate(
            record=host(gpus=(SHARED,)), reserved=Reservation(HostId("one"), gpus=(GpuShare(A100.device_id, 1),))
        ),
        "needs 1 GPU, at most 0 are free",
    ),
    (
        "vcpu_too_large",
        Demand(12_500, 256),
        candidate(record=host(vcpu_overcommit_milli=1500)),
        "needs 12.5 vCPUs, no host has more than 12",
    ),
]


@pytest.mark.parametrize(("code", "wanted", "excluded", "message"), GPUS)
def test_devices_taints_and_moves_are_reasons(code: str, wanted: Demand, excluded: HostView, message: str) -> None:
    """What a host lacks of devices, keeps for others or still removes is said by name."""
    wish = Wish(avoid_hosts=frozenset({HostId("one-0")}) if code == "leaving" else frozenset())
    assert refuse(wanted, [excluded], wish) == (RefusalReason(code, 1, message),)


def test_a_tolerated_taint_excludes_nobody() -> None:
    """A sandbox that tolerates all taints of a host by name and value may go there."""
    cluster = Cluster()
    cluster.upsert_host(candidate(record=host(taints=(TRAINING,))))
    assert cluster.choose(Demand(1000, 256, tolerations=(TRAINING, GOLD))) is not None
    assert cluster.choose(Demand(1000, 256, tolerations=(Label("for", "tests"),))) is None
