"""A fleet for mb: a scheduler on the in-memory store, and a tree with a jcard to submit."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic

import pytest

from fleet.store.memory import MemoryStore
from provisioning.embedded.pki import create_pki
from tests.integration.mb.desk import Desk
from tests.integration.mb.parts import Mb
from tests.integration.scheduler.parts import Fleet, ObedientHost

JCARD = """
name = "run"
[resources]
cpus = 1
memory = "1GiB"
disk = "1GiB"
[[shared]]
host = "."
guest = "/workspace"
[agent]
name = "worker"
harness = "custom"
command = ["run"]
"""


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates of one fleet."""
    folder = tmp_path_factory.mktemp("mb") / "pki"
    create_pki(folder)
    return folder


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    """An empty store."""
    opened = MemoryStore(monotonic)
    yield opened
    await opened.close()


@pytest.fixture
async def fleet(store: MemoryStore, pki: Path) -> AsyncIterator[Fleet]:
    """A scheduler that serves."""
    async with Fleet(store, pki).running() as serving:
        yield serving


@pytest.fixture
async def local(store: MemoryStore, fleet: Fleet, pki: Path, tmp_path: Path) -> AsyncIterator[ObedientHost]:
    """A host that is alive and obeys."""
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(ObedientHost(store, pki, tmp_path / "host").running())


@pytest.fixture
async def mb(fleet: Fleet, tmp_path: Path) -> AsyncIterator[Mb]:
    """The command line of a tenant."""
    command_line = Mb(fleet, tmp_path)
    yield command_line
    await command_line.close()


@pytest.fixture
async def desk(pki: Path) -> AsyncIterator[Desk]:
    """A scheduler's API without a fleet behind it."""
    async with Desk(pki).serving() as serving:
        yield serving


@pytest.fixture
async def line(desk: Desk, tmp_path: Path) -> AsyncIterator[Mb]:
    """The command line of a tenant at the desk."""
    command_line = Mb(desk, tmp_path)
    yield command_line
    await command_line.close()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with a jcard and two files."""
    folder = tmp_path / "tree"
    (folder / "src").mkdir(parents=True)
    (folder / "jcard.toml").write_text(JCARD)
    (folder / "src" / "a.py").write_text("one\ntwo\n")
    (folder / "old name.txt").write_text("bye\n")
    return folder
