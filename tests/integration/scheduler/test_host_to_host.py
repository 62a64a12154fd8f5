"""What goes from host to host with a sandbox: its source, of which there is a second copy, and whoever follows its output."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bedplate.content.v1 import content_pb2
from bedplate.host.v1 import service_pb2 as host_pb2
from bedplate.sandbox.v1 import service_pb2
from fleet.codec import to_message
from fleet.identity import Role
from fleet.model.ids import Digest, HostId
from fleet.model.sandbox import Agent, Restart
from fleet.rpc import CHUNK_BYTES
from fleet.store.memory import MemoryStore
from provisioning.embedded.pki import SECOND_HOST
from scheduler.api.copies import next_copy
from tests.integration.scheduler.parts import HANG_S, Fleet, ObedientHost
from tests.integration.scheduler.test_relays import ID, digest_of, pack, upload
from tests.unit.scheduler.build import DEMO, SOURCE, host, snapshot, spec

ONE, TWO, THREE = HostId("one"), HostId("two"), HostId("three")


@pytest.fixture
async def second(memory: MemoryStore, pki: Path, tmp_path: Path) -> AsyncIterator[ObedientHost]:
    """Another host that is alive."""
    async with ObedientHost(memory, pki, tmp_path / SECOND_HOST, HostId(SECOND_HOST)).running() as running:
        yield running


async def test_a_second_host_gets_what_was_sent_to_one(
    memory: MemoryStore, pki: Path, tmp_path: Path, second: ObedientHost
) -> None:
    """Bit for bit, of any number of chunks, without the client's waiting for it; asking for it later brings it too."""
    content = pack(3 * CHUNK_BYTES)
    digest = digest_of(content)
    async with Fleet(memory, pki).running() as fleet:
        await fleet.knows(second.host_id)
        demo = fleet.client(Role.TENANT, "demo")
        await demo.content.UploadSource(upload(content))
        async with ObedientHost(memory, pki, tmp_path / "late").running() as late:
            await fleet.knows(late.host_id)
            assert (await demo.content.HasSource(content_pb2.HasSourceRequest(digest=digest))).is_held
            async with asyncio.timeout(HANG_S):
                while not late.sources.has(DEMO, digest):
                    changed = late.mirror.changed()
                    await asyncio.wait([asyncio.ensure_future(changed.wait())], timeout=0.05)
            assert second.sources.has(DEMO, digest)


async def test_output_is_followed_from_host_to_host(memory: MemoryStore, pki: Path, tmp_path: Path) -> None:
    """A sandbox that moves begins its output anew: who follows gets all of it, on the stream it has and on a later one."""
    agents = (Agent("worker", "custom", ("true",), restart=Restart.ALWAYS, memory_mib=256),)
    request = service_pb2.CreateSandboxRequest(sandbox_id=ID, spec=to_message(spec(agents=agents)))
    async with ObedientHost(memory, pki, tmp_path / "first").running() as first, Fleet(memory, pki).running() as fleet:
        await fleet.knows(first.host_id)
        demo, operator = fleet.client(Role.TENANT, "demo"), fleet.client(Role.OPERATOR, "operator")
        await demo.sandboxes.CreateSandbox(request)
        await first.ordered(ID)
        await first.start(ID)
        await first.print(ID, b"at first\n")
        stream = demo.output.ReadOutput(service_pb2.ReadOutputRequest(sandbox=ID, follow=True))
        async with asyncio.timeout(HANG_S):
            one = await stream.read()
            assert (one.payload, one.placement) == (b"at first\n", 1)
            async with ObedientHost(memory, pki, tmp_path / SECOND_HOST, HostId(SECOND_HOST)).running() as second:
                await fleet.knows(second.host_id)
                await operator.hosts.DrainHost(host_pb2.DrainHostRequest(host_id=first.host_id))
                await second.ordered(ID)
                await second.start(ID)
                await second.print(ID, b"then\n")
                other = await stream.read()
                assert (other.offset, other.payload, other.placement) == (0, b"then\n", 2)
                late = service_pb2.ReadOutputRequest(sandbox=ID, offset=len(one.payload), placement=1, follow=True)
                again = await demo.output.ReadOutput(late).read()
                assert (again.offset, again.payload, again.placement) == (0, b"then\n", 2)
                stream.cancel()


@pytest.mark.parametrize(
    ("holders", "alive", "expected"),
    [
        ({ONE}, {ONE, TWO}, (ONE, TWO)),
        ({ONE}, {ONE}, None),
        ({ONE}, {TWO, THREE}, None),
        ({ONE, TWO}, {ONE, TWO, THREE}, None),
        ({ONE, TWO}, {TWO, THREE}, (TWO, THREE)),
        (set(), {ONE, TWO}, None),
    ],
)
def test_which_copy_is_next(holders: set[HostId], alive: set[HostId], expected: tuple[HostId, HostId] | None) -> None:
    """From a live holder to a live host that is none; nothing where two live hosts have it, or only one is there."""
    hosts = [host(name) for name in (ONE, TWO, THREE)]
    parts = snapshot(hosts=hosts, alive=frozenset(alive), sources={(DEMO, Digest(SOURCE)): frozenset(holders)})
    assert next_copy(parts, DEMO, Digest(SOURCE)) == expected
