"""Stores under a scheduler: the in-memory twin, and a real etcd that is emptied for each test."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic

import pytest

from fleet.identity import Role
from fleet.store.etcd import open_etcd
from fleet.store.keyspace import EVENTS, LEADER, ROOT
from fleet.store.memory import MemoryStore
from fleet.store.port import Delete, Put, Store, Unmoved
from provisioning.embedded.etcd import LOOPBACK, free_ports, start_etcd
from provisioning.embedded.pki import create_pki, tls_files
from tests.integration.scheduler.parts import HANG_S, Decider, Fleet, ObedientHost, running


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates of one fleet."""
    folder = tmp_path_factory.mktemp("fleet") / "pki"
    create_pki(folder)
    return folder


@pytest.fixture(scope="session")
def etcd_endpoint(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real etcd's endpoint."""
    client_port, peer_port = free_ports(2)
    program = start_etcd(tmp_path_factory.mktemp("etcd"), pki, client_port, peer_port)
    yield f"{LOOPBACK}:{client_port}"
    program.stop()


@pytest.fixture
async def memory() -> MemoryStore:
    """The in-memory twin."""
    return MemoryStore(monotonic)


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.root)])
async def store(request: pytest.FixtureRequest, pki: Path) -> AsyncIterator[Store]:
    """An empty store."""
    if request.param == "memory":
        opened: Store = MemoryStore(monotonic)
    else:
        opened = open_etcd([request.getfixturevalue("etcd_endpoint")], tls_files(pki, Role.SCHEDULER, "scheduler"))
        for prefix in (ROOT, EVENTS):
            for entry in (await opened.list_prefix(prefix)).entries:
                await opened.transact([], [Delete(entry.key)])
    yield opened
    await opened.close()


@pytest.fixture
async def fence(store: Store) -> Unmoved:
    """The condition under which a scheduler leads."""
    return Unmoved(LEADER, (await store.transact([], [Put(LEADER, b"one")])).revision)


@pytest.fixture
async def decider(store: Store, fence: Unmoved) -> AsyncIterator[Decider]:
    """A scheduler that leads and follows the store; a test tells it when to look."""
    made = Decider(store, fence)
    async with running(made.mirror.run()):
        await made.mirror.wait_for(fence.mod_revision, HANG_S)
        yield made


@pytest.fixture
async def fleet(store: Store, pki: Path) -> AsyncIterator[Fleet]:
    """A scheduler that serves, without a host."""
    async with Fleet(store, pki).running() as serving:
        yield serving


@pytest.fixture
async def local(store: Store, pki: Path, tmp_path: Path) -> AsyncIterator[ObedientHost]:
    """A host that is alive and obeys."""
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(ObedientHost(store, pki, tmp_path / "host").running())
