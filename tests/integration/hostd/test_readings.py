"""What hostd tells of output by time and lines, of use, and of events: the services themselves, without the wire."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bedplate.sandbox.v1 import event_pb2, network_pb2, service_pb2
from fleet.errors import InvalidSpecError, NotFoundError
from fleet.model.sandbox import Goal, Phase
from hostd.api.changes import Changes
from hostd.api.events import EventService
from hostd.api.network import NetworkService
from hostd.api.output import TAIL_LINES_MAX, OutputService
from hostd.api.usage import UsageService
from hostd.drivers.ports import LinkMessage
from hostd.moments import note_moment
from hostd.traffic import Traffic
from tests.integration.hostd.parts import ACME, HOST, A, Hostd, Room

pytestmark = pytest.mark.timeout(60)


async def read_output(hostd: Hostd, **asked: Any) -> bytes:
    service = OutputService(hostd.orders, Changes())
    request = service_pb2.ReadOutputRequest(sandbox=A, tenant=ACME, **asked)
    return b"".join([chunk.payload async for chunk in service.ReadOutput(request, None)])


async def test_output_since_and_tail(tmp_path: Path) -> None:
    """The later of time, lines and offset is where the output begins; too many lines are refused by name."""
    room = Room(tmp_path)
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until(lambda: A in hostd.orders.orders and hostd.status().agents[0].output_bytes == 5)
        path = hostd.orders.output_path(A, "agent-0")
        note_moment(path, 5, 2_000_000)
        path.write_bytes(b"done\nlate\nlast\n")
        assert await read_output(hostd, since_ms=1_500_000) == b"late\nlast\n"
        assert await read_output(hostd, tail_lines=1) == b"last\n"
        assert await read_output(hostd, since_ms=1_500_000, tail_lines=3) == b"late\nlast\n"
        assert await read_output(hostd, offset=12, tail_lines=3) == b"st\n"
        with pytest.raises(InvalidSpecError) as caught:
            await read_output(hostd, tail_lines=TAIL_LINES_MAX + 1)
        assert caught.value.field == "tail_lines"


async def test_use_is_told_for_whom_it_is_asked(tmp_path: Path) -> None:
    """Every VM of the tenant, with what its guest says of its memory; another tenant's caller sees none."""
    room = Room(tmp_path)
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        await hostd.sessions.receive(A, LinkMessage("heartbeat", {"memory_used_mib": 90}))
        service = UsageService(HOST, hostd.orders, hostd.sessions, room.hypervisor.measure, room.disks.measure_scratch)
        mine = await service.ReadUsage(service_pb2.ReadUsageRequest(tenant=ACME), None)
        others = await service.ReadUsage(service_pb2.ReadUsageRequest(tenant="other"), None)
        everyones = await service.ReadUsage(service_pb2.ReadUsageRequest(), None)
        (usage,) = mine.usages
        assert (usage.sandbox_id, usage.host_id, usage.guest_memory_mib) == (A, HOST, 90)
        assert (usage.vmm_memory_mib, usage.heard_at_ms > 0) == (room.hypervisor.domains[A].machine.memory_mib, True)
        assert (len(others.usages), len(everyones.usages)) == (0, 1)


async def test_events_are_followed(tmp_path: Path) -> None:
    """A follower gets what is there and then what comes; a reader of another tenant gets nothing."""
    room = Room(tmp_path)
    async with Hostd(room).running() as hostd:
        service = EventService(hostd.orders.journal)
        told: asyncio.Queue[str] = asyncio.Queue()

        async def follow() -> None:
            request = event_pb2.ReadEventsRequest(sandbox=A, tenant=ACME, follow=True)
            async for event in service.ReadEvents(request, None):
                await told.put(event.kind)

        follower = asyncio.create_task(follow())
        hostd.accept(room.order("sleep"))
        assert [await told.get() for _ in range(4)] == [
            *("order.taken", "run.begun", "agent.phase_changed", "sandbox.phase_changed")
        ]
        request = event_pb2.ReadEventsRequest(tenant="other")
        assert [event async for event in service.ReadEvents(request, None)] == []
        follower.cancel()
        await asyncio.wait([follower])


async def test_a_network_log_is_followed_to_its_sandboxs_end(tmp_path: Path) -> None:
    """What is there, then what comes, until the sandbox is gone; by time; and for its own tenant only."""
    room = Room(tmp_path)
    async with Hostd(room).running() as hostd:
        hostd.accept(room.order("sleep"))
        await hostd.until_phase(Phase.RUNNING)
        now_ms, changes, told = [1000], Changes(), asyncio.Queue[tuple[int, str, int]]()
        traffic = Traffic(lambda sandbox_id: hostd.orders.artifact_path(sandbox_id).parent, lambda: now_ms[0])
        traffic.on_append(changes.nudge)
        service = NetworkService(hostd.orders, traffic, changes)

        async def follow(**asked: Any) -> None:
            request = network_pb2.ReadNetworkRequest(sandbox=A, tenant=ACME, **asked)
            async for event in service.ReadNetwork(request, None):
                await told.put((event.seq, event.reason, event.count))

        order = hostd.orders.orders[A]
        traffic.note_drops(order, {"closed": 2})
        follower = asyncio.create_task(follow(follow=True, denied=True))
        assert await told.get() == (1, "closed", 2)
        now_ms[0] = 2000
        traffic.note_drops(order, {"closed": 3, "ipv6": 1})
        assert [await told.get(), await told.get()] == [(2, "closed", 1), (3, "ipv6", 1)]
        await follow(since_ms=1500)
        assert [told.get_nowait()[0] for _ in range(told.qsize())] == [2, 3]
        stranger = service.ReadNetwork(network_pb2.ReadNetworkRequest(sandbox=A, tenant="other"), None)
        with pytest.raises(NotFoundError):
            await anext(stranger)
        hostd.accept(room.order("sleep", goal=Goal.REMOVE))
        await hostd.until(lambda: not hostd.orders.progress)
        hostd.orders.forget_order(A)
        changes.nudge()
        await follower
        assert told.empty()
