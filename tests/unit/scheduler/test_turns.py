"""In which order sandboxes have their turn: by priority, then fairly between tenants, then by age."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fleet.model.host import Capacity
from fleet.model.ids import Tenant
from fleet.model.sandbox import Placement, Resources, SandboxRecord
from scheduler.placement.plan import PLACEMENTS_MAX, plan
from scheduler.placement.settings import Settings
from scheduler.placement.snapshot import Snapshot
from scheduler.placement.turns import Turns
from scheduler.placement.upkeep import cluster_of
from scheduler.placement.wishes import ask_of
from tests.unit.scheduler.build import DEMO, NOW_MS, OTHER, assignment, host, record, snapshot, spec

ORDINARY = Settings()
THIRD = Tenant("third")
WIDE = host(capacity=Capacity(1000, 1_000_000, 1_000_000, 1000))


def order_of(seen: Snapshot, waiting: Sequence[SandboxRecord], settings: Settings = ORDINARY) -> list[SandboxRecord]:
    """The turns when everything is placed."""
    turns = Turns(seen, len(seen.hosts), [ask_of(seen, one) for one in waiting], settings, 0)
    found = []
    while (ask := turns.next()) is not None:
        turns.give(ask)
        found.append(ask.record)
    return found


def wishes(
    tenant: Tenant, numbers: range, resources: Resources | None = None, priority: int = 0
) -> list[SandboxRecord]:
    """The older the smaller the number."""
    wanted = {"resources": resources} if resources else {}
    return [
        record(number, tenant=tenant, spec=spec(number, placement=Placement(priority), **wanted)) for number in numbers
    ]


def test_priority_comes_first() -> None:
    """However old, and however little its tenant has."""
    urgent = wishes(DEMO, range(50, 53), priority=5)
    others = wishes(OTHER, range(3)) + wishes(DEMO, range(10, 13), priority=-1)
    assert order_of(snapshot(hosts=[WIDE]), [*others, *urgent])[:3] == urgent


def test_tenants_take_turns() -> None:
    """One that sends a thousand first does not go before one that sends three."""
    many, few = wishes(DEMO, range(100)), wishes(OTHER, range(500, 503))
    first = order_of(snapshot(hosts=[WIDE]), [*many, *few])[:6]
    assert Counter(one.tenant for one in first) == {DEMO: 3, OTHER: 3}
    assert [one for one in first if one.tenant == DEMO] == many[:3]


def test_what_a_tenant_has_most_of_counts() -> None:
    """Nine vCPUs of a thousand against memory: who wants much of one thing has fewer turns, whatever it is."""
    heavy = wishes(DEMO, range(20), Resources(vcpus=4, memory_mib=512, disk_mib=16))
    broad = wishes(OTHER, range(500, 520), Resources(vcpus=1, memory_mib=1000, disk_mib=16))
    first = order_of(snapshot(hosts=[WIDE]), [*heavy, *broad])[:10]
    assert Counter(one.tenant for one in first) == {DEMO: 2, OTHER: 8}


def test_what_runs_counts() -> None:
    """A tenant that has much already lets the others go first."""
    running = wishes(DEMO, range(10))
    seen = snapshot(records=running, assignments=[assignment(one, WIDE) for one in running], hosts=[WIDE])
    order = order_of(seen, [*wishes(DEMO, range(20, 25)), *wishes(OTHER, range(500, 505))])
    assert [one.tenant for one in order] == [OTHER] * 5 + [DEMO] * 5


def test_a_tenant_may_be_due_more() -> None:
    """One that is due three times as much has three turns for each of another's."""
    waiting = [*wishes(DEMO, range(30)), *wishes(OTHER, range(500, 530))]
    first = order_of(snapshot(hosts=[WIDE]), waiting, Settings(tenants=((DEMO, 3),)))[:12]
    assert Counter(one.tenant for one in first) == {DEMO: 9, OTHER: 3}


def test_everybody_has_one_turn() -> None:
    """Each once, in whatever order they came."""
    waiting = [
        *wishes(DEMO, range(7)),
        *wishes(OTHER, range(20, 27), priority=1),
        *wishes(THIRD, range(40, 47)),
        *wishes(DEMO, range(60, 63), priority=1),
    ]
    found = order_of(snapshot(hosts=[WIDE]), waiting)
    assert sorted(one.sandbox_id for one in found) == sorted(one.sandbox_id for one in waiting)
    assert order_of(snapshot(hosts=[WIDE]), waiting[::-1]) == found


def test_the_last_room_is_shared() -> None:
    """With room for four, two tenants of which one came first get two each."""
    tight = host(capacity=Capacity(4, 100_000, 100_000, 100))
    waiting = [*wishes(DEMO, range(10)), *wishes(OTHER, range(500, 510))]
    seen = snapshot(records=waiting, hosts=[tight])
    made = plan(seen, cluster_of(seen, NOW_MS), waiting, now_ms=NOW_MS)
    assert Counter(one.tenant for one in made.assignments) == {DEMO: 2, OTHER: 2}


def test_a_cut_plan_says_so() -> None:
    """What is past PLACEMENTS_MAX is left for the next, and what may not begin yet is in neither."""
    waiting = wishes(DEMO, range(PLACEMENTS_MAX + 2))
    later = [replace(one, not_before_ms=NOW_MS + 1) for one in wishes(DEMO, range(500, 502))]
    seen = snapshot(records=[*waiting, *later], hosts=[WIDE])
    made = plan(seen, cluster_of(seen, NOW_MS), [*waiting, *later], now_ms=NOW_MS)
    assert (len(made.assignments), made.is_whole) == (PLACEMENTS_MAX, False)
    made = plan(seen, cluster_of(seen, NOW_MS), [*waiting[:5], *later], now_ms=NOW_MS)
    assert (len(made.assignments), made.is_whole) == (5, True)
