"""The stores that the contract suites run against: the in-memory twin, and a real etcd with client certificates."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from time import monotonic

import pytest

from fleet.identity import Role
from fleet.store.etcd import open_etcd
from fleet.store.memory import MemoryStore
from fleet.store.port import Store
from provisioning.embedded.etcd import LOOPBACK, free_ports, start_etcd
from provisioning.embedded.pki import create_pki, tls_files


@pytest.fixture(scope="session")
def etcd_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A real etcd's endpoint and the folder of certificates that open it."""
    folder = tmp_path_factory.mktemp("etcd")
    create_pki(folder / "pki")
    client_port, peer_port = free_ports(2)
    program = start_etcd(folder / "etcd", folder / "pki", client_port, peer_port)
    yield f"{LOOPBACK}:{client_port}", folder / "pki"
    program.stop()


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.root)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """A store; etcd's keeps the keys of earlier tests, so each test uses a prefix of its own."""
    if request.param == "memory":
        opened: Store = MemoryStore(monotonic)
    else:
        endpoint, pki = request.getfixturevalue("etcd_endpoint")
        opened = open_etcd([endpoint], tls_files(pki, Role.SCHEDULER, "scheduler"))
    yield opened
    await opened.close()


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Keys of this test only."""
    return f"/{request.node.name}/"
