"""Three real etcd members on machines of their own, and networks that swallow packets: a program goes on with whoever answers."""

import asyncio
import datetime
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic

import pytest

from fleet.errors import UnavailableError
from fleet.identity import Identity, KeyPair, Role, TlsFiles
from fleet.store.etcd import EtcdStore, open_etcd
from fleet.store.lease import LeaseKeeper
from fleet.store.mirror import Mirror
from fleet.store.port import Put, StoreUnavailableError
from provisioning.embedded.etcd import EtcdMember, is_serving, start_member
from provisioning.embedded.machines import DESK, Rack
from provisioning.embedded.pki import add_certificate, create_pki, tls_files
from provisioning.embedded.process import Program

HANG_S = 60.0
# It outlives what gRPC's keepalive alone would need to find out, were a member's silence found by nothing else.
TTL_S = 15.0
NAMES = ("etcd-1", "etcd-2", "etcd-3")

pytestmark = pytest.mark.root


class Cluster:
    """The members, their machines and programs."""

    def __init__(self, folder: Path) -> None:
        assert os.environ.get("BEDPLATE_PRIVATE") == "1", "this test makes a network: run it in private namespaces"
        self.pki = folder / "pki"
        create_pki(self.pki)
        authority = KeyPair((self.pki / "ca.crt").read_bytes(), (self.pki / "ca.key").read_bytes())
        self.rack, self.members, now = Rack(), [], datetime.datetime.now(datetime.UTC)
        for name in NAMES:
            machine = self.rack.add(name)
            add_certificate(self.pki, authority, Identity(Role.STORE, name), now, machine.address)
            address = machine.address
            self.members.append(EtcdMember(name, f"{address}:2379", f"{address}:2380", machine.within()))
        self.programs: list[Program] = [
            start_member(folder / one.name, self.pki, one, self.members) for one in self.members
        ]

    @property
    def tls(self) -> TlsFiles:
        """A scheduler's certificate."""
        return tls_files(self.pki, Role.SCHEDULER, "scheduler")

    def store(self, names: Sequence[str] = NAMES) -> EtcdStore:
        """A store that knows the members `names`."""
        return open_etcd([one.client for one in self.members if one.name in names], self.tls)

    async def leader(self) -> str:
        """Which member the others follow."""
        for one in self.members:
            store = self.store([one.name])
            try:
                if (await store.condition()).is_leader:
                    return one.name
            finally:
                await store.close()
        raise AssertionError("no member leads")

    def stop(self) -> None:
        """Ends all of it."""
        for program in self.programs:
            program.stop()
        self.rack.stop()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three members that serve."""
    made = Cluster(tmp_path)
    for one in made.members:
        while not is_serving(one.client, tls_files(made.pki, Role.STORE, one.name)):
            pass
    yield made
    made.stop()


@asynccontextmanager
async def living(store: EtcdStore) -> AsyncIterator[tuple[Mirror, list[int]]]:
    """A program as all of ours: it holds a lease and follows a prefix; with the leases it has taken so far."""
    mirror, leases = Mirror(store, "/test/"), []

    async def granted(lease_id: int) -> None:
        await store.transact([], [Put("/test/alive", b"", lease_id)])
        leases.append(lease_id)

    keeper = LeaseKeeper(store, TTL_S, granted, monotonic)
    runners = [asyncio.create_task(part.run()) for part in (mirror, keeper)]
    try:
        async with asyncio.timeout(HANG_S):
            while "/test/alive" not in mirror.entries:
                await mirror.changed().wait()
        yield mirror, leases
    finally:
        for runner in runners:
            runner.cancel()
            with suppress(asyncio.CancelledError):
                await runner


async def test_members_that_fall_silent_are_left(cluster: Cluster) -> None:
    """Each member in turn is behind a network that swallows what is sent to it: writes are seen, and the lease is never lost."""
    store, other = cluster.store(), cluster.store()
    async with living(store) as (mirror, leases):
        for name in NAMES:
            cluster.rack.cut(DESK, name)
            committed = await put(other, f"/test/without-{name}")
            await mirror.wait_for(committed, HANG_S)
            async with asyncio.timeout(HANG_S):
                await store.get("/test/alive")
            cluster.rack.heal()
        revision = await put(store, "/test/last")
        await mirror.wait_for(revision, HANG_S)
        assert len(leases) == 1
    await store.close()
    await other.close()


async def test_a_member_without_its_peers_is_left(cluster: Cluster) -> None:
    """A member that is cut off from the others still takes connections: its watchers move on and see what comes, in time."""
    store = cluster.store()
    async with living(store) as (mirror, leases):
        for name in NAMES:
            for peer in NAMES:
                if peer != name:
                    cluster.rack.cut(name, peer)
                    cluster.rack.cut(peer, name)
            committed = await put(cluster.store([one for one in NAMES if one != name]), f"/test/apart-{name}")
            await mirror.wait_for(committed, HANG_S)
            cluster.rack.heal()
        assert len(leases) == 1
    await store.close()


async def test_a_deaf_leader_gives_way(cluster: Cluster) -> None:
    """The member that leads still sends to its peers and hears nothing: the others elect one, and writes go on."""
    store = cluster.store()
    leader = await cluster.leader()
    for peer in NAMES:
        if peer != leader:
            cluster.rack.cut(peer, leader)
    committed = await put(store, "/test/deaf")
    cluster.rack.heal()
    assert committed
    await store.close()


async def test_a_watch_that_was_not_answered_yet_moves_on(cluster: Cluster) -> None:
    """The first member takes the connection and nothing more: a watch that waits there is taken to the next, too."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        store = open_etcd([address, *(one.client for one in cluster.members)], cluster.tls, 0)

        async def watch() -> None:
            async with store.watch("/test/", 1) as batches:
                await anext(aiter(batches))

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0)
        async with asyncio.timeout(HANG_S):
            await store.get("/test/alive")
            with pytest.raises(StoreUnavailableError):
                await watching
        await store.close()


async def test_a_watch_on_a_stopped_member_ends(cluster: Cluster) -> None:
    """A member whose process is stopped keeps its connections: a watch there with no call beside it ends all the same."""
    store = cluster.store([NAMES[0]])
    await put(store, "/test/first")
    async with store.watch("/test/", 1) as batches:
        events = aiter(batches)
        await anext(events)
        cluster.programs[0].signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(HANG_S):
                with pytest.raises(StoreUnavailableError):
                    await anext(events)
        finally:
            cluster.programs[0].signal(signal.SIGCONT)
    await store.close()


async def put(store: EtcdStore, key: str) -> int:
    """Puts a key as our programs do: what is not answered is tried again; the revision by which it was there."""
    async with asyncio.timeout(HANG_S):
        while True:
            try:
                return (await store.transact([], [Put(key, b"")])).revision
            except UnavailableError:
                await asyncio.sleep(0.1)
