"""Each filter excludes exactly the hosts it names, and says why."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.model.assignment import RefusalReason
from fleet.model.host import Accelerator, Capacity, HostImage
from fleet.model.ids import NO_DIGEST, Digest
from fleet.model.sandbox import ImageRef, Label, Network, NetworkMode, Resources, SandboxSpec
from scheduler.placement.filters import FILTERS, NO_HOSTS, Candidate, first_excluding, refuse, resolve_image
from tests.unit.scheduler.build import BASE, NOW_MS, ROOMY, host, sandbox_id, spec

OTHER_DIGEST = Digest("sha256:" + "c" * 64)
GOLD = Label("disk", "nvme")


def candidate(**changes: Any) -> Candidate:
    return replace(Candidate(host(), ROOMY), **changes)


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
    ("sandboxes", spec(), candidate(free=replace(ROOMY, sandboxes=0)), "carries as many sandboxes as it may"),
    ("vcpu", spec(), candidate(free=replace(ROOMY, vcpus=0)), "needs 1 vCPUs, at most 0 are free"),
    (
        "memory",
        spec(),
        candidate(free=replace(ROOMY, memory_mib=711)),
        "needs 712 MiB of memory, at most 711 are free",
    ),
    ("disk", spec(), candidate(free=replace(ROOMY, disk_mib=-5)), "needs 1024 MiB of disk, at most 0 are free"),
]


@pytest.mark.parametrize(("code", "wanted", "excluded", "message"), EXCLUDED)
def test_a_filter_excludes_and_explains(code: str, wanted: Any, excluded: Candidate, message: str) -> None:
    """The host is excluded by the filter of that code, and the refusal says in one sentence what is missing."""
    filter_ = first_excluding(wanted, excluded)
    assert filter_ is not None
    assert filter_.code == code
    # Beside one that could carry all of these if it were alive: waiting for that one is not in vain.
    refusal = refuse(sandbox_id(0), wanted, [excluded, ABLE], NOW_MS)
    own = RefusalReason(code, 1, message)
    away = RefusalReason("alive", 1, "not alive")
    assert set(refusal.reasons) == ({own, away} if code != "alive" else {replace(own, hosts=2)})


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
    full = candidate(free=Capacity(0, 0, 0, 0))
    fleet = [full, candidate(is_alive=False), Candidate(other, ROOMY, is_cordoned=True)]
    assert refuse(sandbox_id(0), wanted, fleet, NOW_MS).reasons == (RefusalReason(code, 3, message),)


def test_one_host_that_could_is_hope() -> None:
    """As long as one host could carry it when empty, the reasons are counted as ever."""
    full = candidate(free=Capacity(0, 0, 0, 0))
    without = candidate(record=host("two", images=()))
    reasons = refuse(sandbox_id(0), spec(), [full, without], NOW_MS).reasons
    assert [reason.code for reason in reasons] == ["image", "sandboxes"]


def test_what_fits_exactly_passes() -> None:
    """A host with precisely what is needed, the VMM's overhead included, can carry the sandbox."""
    exact = candidate(free=Capacity(vcpus=1, memory_mib=712, disk_mib=1024, sandboxes=1))
    assert first_excluding(spec(), exact) is None


def test_emulation_needs_more_memory() -> None:
    """On a TCG host the translation buffer counts as well."""
    emulated = candidate(record=host(accelerator=Accelerator.TCG), free=replace(ROOMY, memory_mib=712))
    filter_ = first_excluding(spec(), emulated)
    assert filter_ is not None
    assert filter_.code == "memory"


def test_a_host_counts_once_under_its_first_filter() -> None:
    """Counts add up to the hosts considered, and come in the order of FILTERS."""
    away_and_full = candidate(is_alive=False, free=Capacity(0, 0, 0, 0))
    full = candidate(free=Capacity(0, 0, 0, 0))
    narrow = candidate(free=replace(ROOMY, memory_mib=100))
    narrower = candidate(free=replace(ROOMY, memory_mib=50))
    refusal = refuse(sandbox_id(0), spec(), [narrower, full, away_and_full, narrow], NOW_MS)
    assert [(reason.code, reason.hosts) for reason in refusal.reasons] == [
        ("alive", 1),
        ("sandboxes", 1),
        ("memory", 2),
    ]
    assert refusal.hosts_considered == 4
    assert refusal.reasons[-1].message == "needs 712 MiB of memory, at most 100 are free"


def test_no_host_at_all_is_a_reason() -> None:
    """Without any host the refusal says so instead of staying silent."""
    assert refuse(sandbox_id(0), spec(), [], NOW_MS).reasons == (NO_HOSTS,)


def test_the_order_of_filters_is_stable() -> None:
    """The documented order, which decides under which reason a host is counted."""
    order = ["readable", "alive", "cordoned", "backing_off", "leaving", "labels", "network_mode", "image"]
    order += ["sandboxes", "vcpu", "memory", "disk"]
    assert [one.code for one in FILTERS] == order


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
    assert resolve_image(image, holder) == resolved


def test_resources_are_compared_with_what_is_left() -> None:
    """What others have set aside is not there: capacity alone decides nothing."""
    wanted = spec(resources=Resources(vcpus=4, memory_mib=512, disk_mib=1024))
    filter_ = first_excluding(wanted, candidate(free=replace(ROOMY, vcpus=3)))
    assert filter_ is not None
    assert filter_.code == "vcpu"
