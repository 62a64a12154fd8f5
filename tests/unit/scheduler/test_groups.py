"""Groups: their members are placed together or not at all, and wait for each other."""

from dataclasses import replace

import pytest

from fleet.model.admission import GROUP_SIZE_MAX
from fleet.model.host import Capacity
from fleet.model.sandbox import Label, Placement, Resources, SandboxRecord
from fleet.store.port import TRANSACTION_OPS_MAX
from scheduler.commit import plan_changes
from scheduler.placement import groups
from scheduler.placement.groups import GROUP_INCOMPLETE
from scheduler.placement.plan import plan
from scheduler.placement.upkeep import cluster_of
from tests.unit.scheduler.build import NOW_MS, OTHER, assignment, host, planned, record, snapshot, spec

NARROW = Capacity(vcpus=2, memory_mib=8192, disk_mib=8192, sandboxes=8)


def member(number: int, size: int = 3, group: str = "g", vcpus: int = 1, **changes: object) -> SandboxRecord:
    wanted = spec(number, placement=Placement(group=group, group_size=size), resources=Resources(vcpus, 512, 1024))
    return record(number, spec=wanted, **changes)


def codes(seen_refusals: object) -> list[list[str]]:
    return [[reason.code for reason in one.reasons] for one in seen_refusals]  # type: ignore[attr-defined]


def test_a_group_is_placed_as_a_whole_or_not_at_all() -> None:
    """Two hosts of two vCPUs carry three members, and none of five; then what comes later has the room."""
    hosts = [host("one", capacity=NARROW), host("two", capacity=NARROW)]
    made = planned(snapshot(records=[member(number) for number in range(3)], hosts=hosts))
    assert len(made.assignments) == 3
    assert [set(bundle) for bundle in made.together] == [{one.sandbox_id for one in made.assignments}]
    single = record(9)
    made = planned(snapshot(records=[*(member(number, 5) for number in range(5)), single], hosts=hosts))
    assert [one.sandbox_id for one in made.assignments] == [single.sandbox_id]
    assert codes(made.refusals) == [[GROUP_INCOMPLETE, "vcpu"]] * 5
    assert "beside the other 4 of its group" in made.refusals[0].reasons[0].message


def test_members_wait_for_each_other() -> None:
    """Two of three wait, and say how many are there; a namesake of another tenant, size or priority is none of them."""
    strangers = [member(5, tenant=OTHER), member(6, size=4)]
    made = planned(snapshot(records=[member(0), member(1), *strangers], hosts=[host()]))
    assert made.assignments == ()
    told = {one.sandbox_id: one.reasons[0].message for one in made.refusals}
    assert told[member(0).sandbox_id] == "group g has 2 of its 3 members so far"
    assert told[member(6).sandbox_id] == "group g has 1 of its 4 members so far"


def test_members_that_are_being_accepted_wait_for_the_store() -> None:
    """A transaction that both creates and places all of a group would be too large: they are accepted first."""
    stored = [member(0), member(1)]
    seen = snapshot(records=stored, hosts=[host()])
    made = plan(seen, cluster_of(seen, NOW_MS), [*stored, member(2)], now_ms=NOW_MS)
    assert made.assignments == ()
    assert codes(made.refusals) == [[GROUP_INCOMPLETE]] * 3
    assert len(planned(snapshot(records=[*stored, member(2)], hosts=[host()])).assignments) == 3


def test_one_more_than_the_group_has_waits() -> None:
    """The oldest make up the group; what is past its size stays out and says why."""
    made = planned(snapshot(records=[member(number) for number in range(4)], hosts=[host()]))
    assert [one.sandbox_id for one in made.refusals] == [member(3).sandbox_id]
    assert made.refusals[0].reasons[0].message == "group g has its 3 members without it"


def test_a_member_that_lost_its_host_is_placed_alone() -> None:
    """A group holds together until it is placed; later each of its members goes on by itself."""
    carrier = host()
    rest = [member(1), member(2)]
    seen = snapshot(
        records=[member(0, placement=2), *rest], assignments=[assignment(one, carrier) for one in rest], hosts=[carrier]
    )
    assert [one.sandbox_id for one in planned(seen).assignments] == [member(0).sandbox_id]


def test_unlike_members_make_room_for_each_other() -> None:
    """A host that one member would rather have is given up to another that can have no other."""
    zone = Label("zone", "a")
    hosts = [host("here", capacity=NARROW, labels=(zone,)), host("there", capacity=NARROW)]
    gang = Placement(group="g", group_size=2)
    chooser = record(0, spec=spec(0, placement=replace(gang, prefer_labels=(zone,)), resources=Resources(2, 512, 1024)))
    bound = record(1, spec=spec(1, placement=gang, require_labels=(zone,)))
    alone = planned(
        snapshot(
            records=[replace(chooser, spec=replace(chooser.spec, placement=Placement(prefer_labels=(zone,))))],
            hosts=hosts,
        )
    )
    assert [one.host_id for one in alone.assignments] == ["here"]
    made = planned(snapshot(records=[chooser, bound], hosts=hosts))
    assert {one.sandbox_id: one.host_id for one in made.assignments} == {
        chooser.sandbox_id: "there",
        bound.sandbox_id: "here",
    }


def test_a_group_of_the_largest_size_is_one_transaction() -> None:
    """All members of the largest group, each on a host of its own, with refusals to take back, fit into one write."""
    wishes = [member(number, GROUP_SIZE_MAX) for number in range(GROUP_SIZE_MAX)]
    hosts = [host(f"host-{number:02}", capacity=Capacity(1, 8192, 8192, 8)) for number in range(GROUP_SIZE_MAX)]
    before = planned(snapshot(records=wishes))
    seen = snapshot(records=wishes, hosts=hosts, refusals={one.sandbox_id: one for one in before.refusals})
    (change,) = plan_changes(seen, planned(seen))
    # One condition is the leader's.
    assert len({one.key for one in change.unmoved}) + 1 <= TRANSACTION_OPS_MAX
    assert len({one.key for one in change.writes}) <= TRANSACTION_OPS_MAX
    assert len([one for one in change.writes if "/assignment/" in one.key]) == GROUP_SIZE_MAX


def test_a_search_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group for which no arrangement is found within the looks there are is refused, and says that it was tried."""
    monkeypatch.setattr(groups, "LOOKS_MAX", 2)
    made = planned(snapshot(records=[member(0, 2), member(1, 2, vcpus=2)], hosts=[host(capacity=NARROW)]))
    assert made.assignments == ()
    assert "ways that were tried" in made.refusals[0].reasons[0].message


def test_gpus_that_no_host_has_are_refused_in_true_words() -> None:
    """Who asks for a GPU waits, and reads that no host has one: nothing runs without what it asked for."""
    wish = record(0, spec=spec(0, resources=Resources(1, 512, 1024, gpus=1)))
    (refusal,) = planned(snapshot(records=[wish], hosts=[host()])).refusals
    assert [(one.code, one.message) for one in refusal.reasons] == [
        ("gpu_unknown", "no host has 1 GPU; known models: none")
    ]
