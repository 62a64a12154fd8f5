"""mb with several schedulers in its configuration: whoever answers serves, and a sandbox asked for twice is one sandbox."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.errors import UnavailableError
from fleet.identity import Role
from fleet.model.scheduler import Scheduler, SchedulerRecord
from fleet.store.memory import MemoryStore
from mb.client import open_client
from mb.config import ClientConfig, load_client_config
from mb.render.schedulers import render_schedulers
from provisioning.embedded.etcd import LOOPBACK, free_ports
from provisioning.embedded.pki import tls_files
from tests.integration.mb.parts import Mb
from tests.integration.scheduler.parts import Fleet, ObedientHost
from tests.unit.scheduler.build import sandbox_id, spec


@pytest.fixture
def silent() -> Iterator[str]:
    """Where a scheduler was stopped: its kernel takes connections, and nobody answers on them."""
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    listener.listen()
    yield f"{LOOPBACK}:{listener.getsockname()[1]}"
    listener.close()


def config(pki: Path, *addresses: str) -> ClientConfig:
    """A tenant's configuration with these schedulers."""
    return ClientConfig(tls_files(pki, Role.TENANT, "demo"), schedulers=addresses)


async def test_a_scheduler_that_answers_is_found(fleet: Fleet, pki: Path, silent: str) -> None:
    """One address is dead, one is silent, one serves: wherever mb begins, every call and watch gets its answer."""
    dead = f"{LOOPBACK}:{free_ports(1)[0]}"
    orders = [(dead, silent, fleet.address), (silent, fleet.address, dead), (fleet.address, dead, silent)]
    for number, addresses in enumerate(orders):
        async with open_client(config(pki, *addresses)) as client:
            created = await client.create_sandbox(sandbox_id(number), spec(number))
            again = await client.create_sandbox(sandbox_id(number), spec(number))
            assert (created.sandbox_id, again.sandbox_id) == (sandbox_id(number), sandbox_id(number))
            watch = client.watch_sandbox(created.sandbox_id)
            assert (await anext(watch)).sandbox_id == created.sandbox_id
            await watch.aclose()
            assert len(await client.list_sandboxes()) == number + 1


async def test_the_next_scheduler_takes_over(store: MemoryStore, pki: Path) -> None:
    """The scheduler that a client has used ends: the same client goes on with the other."""
    async with Fleet(store, pki).running() as second:
        async with Fleet(store, pki).running() as first:
            await first.answers()
            await second.answers()
            async with open_client(config(pki, first.address, second.address)) as client:
                await client.create_sandbox(sandbox_id(1), spec(1))
        async with open_client(config(pki, first.address, second.address)) as client:
            assert [one.sandbox_id for one in await client.list_sandboxes()] == [sandbox_id(1)]
            watch = client.watch_sandbox(sandbox_id(1))
            assert (await anext(watch)).sandbox_id == sandbox_id(1)
            await watch.aclose()


async def test_none_that_serves_is_told(pki: Path) -> None:
    """With all of them dead the error names them all."""
    addresses = [f"{LOOPBACK}:{port}" for port in free_ports(2)]
    async with open_client(config(pki, *addresses)) as client:
        with pytest.raises(UnavailableError) as caught:
            await client.list_sandboxes()
    assert all(address in caught.value.message for address in addresses)


def test_a_configuration_lists_schedulers(pki: Path, tmp_path: Path) -> None:
    """`schedulers` and `scheduler` may both be there; every address is checked."""
    files = tls_files(pki, Role.TENANT, "demo")
    path = tmp_path / "mb.toml"
    table = f'[tls]\nca = "{files.ca}"\ncertificate = "{files.certificate}"\nkey = "{files.key}"\n'
    path.write_text('scheduler = "10.0.0.1:1"\nschedulers = ["10.0.0.2:1", "10.0.0.3:1"]\n' + table)
    assert load_client_config(path).addresses == ("10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1")
    path.write_text(table)
    with pytest.raises(Exception, match="no scheduler is named"):
        load_client_config(path)


async def test_schedulers_are_listed(fleet: Fleet, local: ObedientHost, tmp_path: Path) -> None:
    """`mb scheduler ls` tells who leads and who serves, as a table and as JSON; tenants are refused."""
    await fleet.knows(local.host_id)
    operator = Mb(fleet, tmp_path, Role.OPERATOR, "operator")
    listed: list[dict[str, Any]] = []
    while not (listed and listed[0]["is_leader"] and listed[0]["record"]["leading_since_ms"]):
        listed = (await operator.run("scheduler", "ls", "--json")).value()
    assert [(one["record"]["name"], one["record"]["address"]) for one in listed] == [("under-test", fleet.address)]
    shown = (await operator.run("scheduler", "ls")).stdout.splitlines()
    assert shown[1].split()[:2] == ["under-test", "leads"]
    refused = await Mb(fleet, tmp_path, Role.TENANT, "demo").run("scheduler", "ls", "--json")
    assert refused.error()["code"] == "role_not_permitted"


def test_a_leaderless_fleet_is_told() -> None:
    """With nobody leading the table says so."""
    others = [Scheduler(SchedulerRecord(name, "10.0.0.1:7443", "0.1.0", 1), is_leader=False) for name in ("a", "b")]
    shown = render_schedulers(others, 10_000)
    assert [line.split()[:2] for line in shown[1:3]] == [["a", "serves"], ["b", "serves"]]
    assert shown[3].startswith("nobody leads")
