"""`mb host` as an operator runs it: a process of its own, over mutual TLS, against a real scheduler."""

from pathlib import Path

import pytest

from fleet.identity import Role
from fleet.store.keyspace import cordon_key
from fleet.store.memory import MemoryStore
from mb.exits import Exit
from tests.integration.mb.parts import Mb
from tests.integration.scheduler.parts import Fleet, ObedientHost


@pytest.fixture
async def operator(fleet: Fleet, tmp_path: Path, local: ObedientHost) -> Mb:
    """An operator's command line, once the scheduler knows the host."""
    await fleet.knows(local.host_id)
    return Mb(fleet, tmp_path, Role.OPERATOR, "operator")


async def test_a_host_is_cordoned_and_shown_so(operator: Mb, store: MemoryStore) -> None:
    """Cordoned with a reason, seen in the table and in JSON with who did it, uncordoned, and all of it safe to repeat."""
    for _ in range(2):
        done = await operator.run("host", "cordon", "local", "--reason", "its disk is replaced")
        assert (done.code, "local is cordoned" in done.stdout) == (Exit.OK, True)
    shown = (await operator.run("host", "ls")).stdout
    assert shown.splitlines()[1].split()[:2] == ["local", "cordoned"]
    assert "cordoned by operator: its disk is replaced" in shown
    (listed,) = (await operator.run("host", "ls", "--json")).value()
    assert (listed["cordon"]["by"], listed["cordon"]["reason"]) == ("operator", "its disk is replaced")
    for _ in range(2):
        assert (await operator.run("host", "uncordon", "local", "--json")).value()["cordon"] is None
    assert (await operator.run("host", "ls")).stdout.splitlines()[1].split()[1] == "alive"
    assert await store.get(cordon_key(listed["record"]["host_id"])) is None


async def test_what_cannot_be_cordoned(operator: Mb, mb: Mb) -> None:
    """A host that is not there, a reason that is a page, and a tenant's certificate are refused by name."""
    assert (await operator.run("host", "cordon", "gone", "--json")).error()["code"] == "host_unknown"
    long = await operator.run("host", "cordon", "local", "--reason", "x" * 201, "--json")
    assert (long.code, long.error()["field"]) == (Exit.INVALID, "reason")
    assert (await mb.run("host", "cordon", "local", "--json")).error()["code"] == "role_not_permitted"
