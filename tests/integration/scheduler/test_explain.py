"""Why a sandbox is where it is: as of now, and as of its decision, which is made again from its record and compared."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest

from bedplate.sandbox.v1 import explain_pb2, explain_pb2_grpc, service_pb2
from fleet.codec import decode, encode, from_message, to_message
from fleet.errors import NotFoundError
from fleet.identity import Role
from fleet.model.cycle import CycleRecord
from fleet.model.explanation import PlacementExplanation
from fleet.model.ids import HostId
from fleet.model.sandbox import Resources, SandboxSpec
from fleet.rpc import error_from_call
from fleet.store.keyspace import cycle_key, host_key
from fleet.store.port import Delete, Put, Store
from tests.integration.scheduler.parts import HANG_S, Client, Fleet
from tests.unit.scheduler.build import host, host_puts, sandbox_id, spec

HUGE = Resources(vcpus=64, memory_mib=512, disk_mib=1024)


@pytest.fixture
async def operator(fleet: Fleet, store: Store) -> Client:
    """An operator of a fleet of two hosts."""
    await fleet.answers()
    await store.transact([], [*host_puts(host("one")), *host_puts(host("two"))])
    await fleet.knows(HostId("two"))
    return fleet.client(Role.OPERATOR, "operator")


async def create(client: Client, number: int, wanted: SandboxSpec | None = None) -> Any:
    """The sandbox once it has a host, or a refusal."""
    message = to_message(wanted or spec(number))
    request = service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id(number), spec=message, tenant="demo")
    made = await client.sandboxes.CreateSandbox(request)
    async with asyncio.timeout(HANG_S):
        async for seen in client.sandboxes.WatchSandbox(service_pb2.GetSandboxRequest(sandbox=made.sandbox_id)):
            if seen.host_id or seen.HasField("refusal"):
                return seen
    raise AssertionError("the watch has ended")


async def explain(client: Client, number: int, *, is_recomputed: bool = False) -> PlacementExplanation:
    stub: Any = explain_pb2_grpc.ExplainServiceStub(client.channel)
    request = explain_pb2.ExplainRequest(sandbox=sandbox_id(number), recompute=is_recomputed)
    return from_message(PlacementExplanation, await stub.Explain(request))


async def refusal_of(client: Client, number: int) -> NotFoundError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await explain(client, number, is_recomputed=True)
    error = error_from_call(caught.value, "scheduler")
    assert isinstance(error, NotFoundError)
    assert error.next_step
    return error


def differing(told: PlacementExplanation) -> set[str]:
    """In what a decision made again is not the recorded one."""
    assert {check.name for check in told.checks} >= {"version", "settings", "input", "record", "decisions"}
    return {check.name for check in told.checks if not check.is_same}


async def test_a_placement_is_explained(operator: Client) -> None:
    """The chosen host is the best of those there were; the terms of each score add up to it."""
    made = await create(operator, 0)
    told = await explain(operator, 0)
    assert (told.host_id, told.considered, told.able, told.reasons) == (made.host_id, 2, 2, ())
    assert {one.host_id for one in told.ranking} == {"one", "two"}
    assert [one.score for one in told.ranking] == [sum(term.value for term in one.terms) for one in told.ranking]


async def test_a_refusal_says_what_would_make_it_fit(operator: Client) -> None:
    """Each filter with the hosts it excludes, and how many of these could carry it but for that."""
    await create(operator, 0, spec(0, resources=HUGE))
    told = await explain(operator, 0)
    assert (told.host_id, told.able, told.ranking) == ("", 0, ())
    assert [(one.code, one.hosts, one.host_ids, one.if_passed) for one in told.excluded] == [
        ("vcpu", 2, ("one", "two"), 2)
    ]
    assert [reason.code for reason in told.reasons] == ["vcpu_too_large"]
    assert differing(await explain(operator, 0, is_recomputed=True)) == set()


async def test_a_past_decision_is_the_same_byte_for_byte(operator: Client, store: Store) -> None:
    """Made again after the fleet has changed in every way: of the input that there was, the very decisions."""
    made = [await create(operator, number) for number in range(5)]
    await store.transact([], [Delete(host_key(HostId(made[0].host_id))), *host_puts(host("a-new-one"))])
    await create(operator, 5)
    for number, one in enumerate(made):
        told = await explain(operator, number, is_recomputed=True)
        assert differing(told) == set()
        assert (told.is_then, told.considered) == (True, 2)
        assert told.ranking[0].host_id == one.host_id


async def test_decisions_of_one_plan_are_explained_in_their_turn(operator: Client) -> None:
    """Of many that were placed together each sees the hosts as those before it had left them."""
    # The scheduler leads once it has placed one.
    await create(operator, 99)
    wanted = [service_pb2.Creation(sandbox_id=sandbox_id(n), spec=to_message(spec(n))) for n in range(12)]
    request = service_pb2.CreateSandboxesRequest(creations=wanted, tenant="demo")
    placed = {
        one.sandbox.sandbox_id: one.sandbox for one in (await operator.sandboxes.CreateSandboxes(request)).results
    }
    for number in range(12):
        told = await explain(operator, number, is_recomputed=True)
        assert differing(told) == set()
        assert told.ranking[0].host_id == placed[sandbox_id(number)].host_id


@pytest.mark.parametrize(
    ("twist", "expected"),
    [
        ("host", {"record", "this one"}),
        ("digest", {"record", "decisions"}),
        ("input", {"input"}),
        ("revision", {"input"}),
        ("settings", {"settings"}),
    ],
)
async def test_a_record_that_was_tampered_with_is_told_apart(
    operator: Client, store: Store, twist: str, expected: set[str]
) -> None:
    """Another host, digest, input, revision or setting in the record: each is seen, and said."""
    made = await create(operator, 0)
    cycle = (await explain(operator, 0)).cycle
    entry = await store.get(cycle_key(cycle))
    assert entry is not None
    record = decode(CycleRecord, entry.value)
    (decision,) = record.decisions
    other = HostId("two" if made.host_id == "one" else "one")
    twisted = {
        "host": replace(record, decisions=(replace(decision, host_id=other),)),
        "digest": replace(record, decisions_digest="0" * 64),
        "input": replace(record, input_digest="0" * 64),
        # One revision before, something was not there yet.
        "revision": replace(record, revision=record.revision - 1),
        "settings": replace(record, settings_digest="0" * 64),
    }[twist]
    await store.transact([], [Put(cycle_key(cycle), encode(twisted))])
    found = differing(await explain(operator, 0, is_recomputed=True))
    assert found == expected or (twist == "revision" and found > expected)


async def test_what_is_gone_is_said(operator: Client, store: Store) -> None:
    """A compacted revision and a record that is gone are errors of their own, with what to do."""
    await create(operator, 0)
    cycle = (await explain(operator, 0)).cycle
    last = await create(operator, 1)
    assert last.host_id
    revision = (await store.list_prefix(cycle_key(cycle))).revision
    await store.compact(revision)
    assert (await refusal_of(operator, 0)).code == "history_compacted"
    await store.transact([], [Delete(cycle_key(cycle))])
    assert (await refusal_of(operator, 0)).code == "cycle_unknown"


async def test_a_tenant_reads_no_other_hosts_name(operator: Client, fleet: Fleet) -> None:
    """It reads how many hosts there were, the scores, and the name of its own."""
    made = await create(operator, 0)
    demo = fleet.client(Role.TENANT, "demo")
    async with asyncio.timeout(HANG_S):
        for is_recomputed in (False, True):
            told = await explain(demo, 0, is_recomputed=is_recomputed)
            assert {one.host_id for one in told.ranking} == {"", made.host_id}
    await create(operator, 1, spec(1, resources=HUGE))
    assert [one.host_ids for one in (await explain(demo, 1)).excluded] == [()]
