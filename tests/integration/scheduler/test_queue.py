"""The leader's loop and the queue: groups that are written at once, and room that is made by ending what has a lower priority."""

from fleet.codec import decode, encode
from fleet.model.assignment import Assignment, Refusal
from fleet.model.host import Capacity
from fleet.model.sandbox import Agent, Goal, Phase, Placement, Resources, Restart, SandboxRecord, Stage, StageName
from fleet.store.keyspace import ASSIGNMENTS, record_key, refusal_key, status_key
from fleet.store.port import Put, Store, Write
from tests.integration.scheduler.parts import HANG_S, Decider
from tests.unit.scheduler.build import DEMO, host, host_puts, record, record_puts, spec, status

CARRIER = host("one", capacity=Capacity(2, 8192, 16_384, 8))
BEGUN = (Stage(StageName.DOMAIN_STARTED, 1),)


def wish(number: int, priority: int = 0, group: str = "", group_size: int = 0) -> SandboxRecord:
    agent = Agent("worker", "custom", ("true",), restart=Restart.ALWAYS, memory_mib=256)
    placement = Placement(priority, group=group, group_size=group_size)
    wanted = spec(number, agents=(agent,), placement=placement, resources=Resources(1, 512, 1024))
    return record(number, spec=wanted)


async def write(store: Store, decider: Decider, *writes: Write) -> None:
    """Writes, and the decider has seen it and looked."""
    await decider.mirror.wait_for((await store.transact([], writes)).revision, HANG_S)
    await decider.cycle.look()


async def orders_in(store: Store) -> dict[str, tuple[Assignment, int]]:
    """The orders of each sandbox, with the revision that made them."""
    entries = (await store.list_prefix(ASSIGNMENTS)).entries
    found = [(decode(Assignment, entry.value), entry.mod_revision) for entry in entries]
    return {order.sandbox_id: (order, revision) for order, revision in found}


async def refusal_of(store: Store, one: SandboxRecord) -> Refusal | None:
    entry = await store.get(refusal_key(one.sandbox_id))
    return decode(Refusal, entry.value) if entry is not None else None


async def say(store: Store, decider: Decider, order: Assignment, phase: Phase, *, released: bool = False) -> None:
    said = status(order, phase, stages=BEGUN, placement=order.placement, released=released)
    await write(store, decider, Put(status_key(said.host_id, said.sandbox_id), encode(said)))


async def test_a_group_is_written_at_once(store: Store, decider: Decider) -> None:
    """Its first member waits and says for what; with the second, both orders have the same revision, and nothing is refused."""
    first, second = wish(1, group="g", group_size=2), wish(2, group="g", group_size=2)
    await write(store, decider, *host_puts(CARRIER), *record_puts(first))
    assert await orders_in(store) == {}
    refusal = await refusal_of(store, first)
    assert refusal is not None
    assert [one.code for one in refusal.reasons] == ["group_incomplete"]
    await write(store, decider, *record_puts(second))
    orders = await orders_in(store)
    assert set(orders) == {first.sandbox_id, second.sandbox_id}
    assert len({revision for _, revision in orders.values()}) == 1
    assert await refusal_of(store, first) is None


async def test_one_of_lower_priority_makes_room(store: Store, decider: Decider) -> None:
    """It is stopped, once; what waits has its room when it has left, and it waits for another host with its reason."""
    low, lower, urgent = wish(1, priority=1), wish(2), wish(3, priority=7)
    await write(store, decider, *host_puts(CARRIER), *record_puts(low), *record_puts(lower))
    for order, _ in (await orders_in(store)).values():
        await say(store, decider, order, Phase.RUNNING)
    await write(store, decider, *record_puts(urgent))
    orders = {one: order for one, (order, _) in (await orders_in(store)).items()}
    assert {one: order.goal for one, order in orders.items()} == {low.sandbox_id: Goal.RUN, lower.sandbox_id: Goal.STOP}
    refusal = await refusal_of(store, urgent)
    assert refusal is not None
    assert (refusal.host_id, [one.code for one in refusal.reasons]) == (CARRIER.host_id, ["preempting"])
    # While it stops, looking again ends nobody else.
    for _ in range(3):
        await decider.cycle.look()
    assert {one: order.goal for one, (order, _) in (await orders_in(store)).items()} == {
        low.sandbox_id: Goal.RUN,
        lower.sandbox_id: Goal.STOP,
    }
    await say(store, decider, orders[lower.sandbox_id], Phase.STOPPED, released=True)
    await decider.cycle.look()
    gone = (await orders_in(store))[lower.sandbox_id][0]
    assert gone.goal is Goal.REMOVE
    await say(store, decider, gone, Phase.REMOVED, released=True)
    await decider.cycle.look()
    assert (await orders_in(store))[urgent.sandbox_id][0].host_id == CARRIER.host_id
    entry = await store.get(record_key(DEMO, lower.sandbox_id))
    assert entry is not None
    moved = decode(SandboxRecord, entry.value)
    assert (moved.goal, moved.placement, moved.reason is not None and moved.reason.code) == (Goal.RUN, 2, "preempted")
    assert await refusal_of(store, lower) is not None
