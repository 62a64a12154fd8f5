"""A host that is cut off from the store alone: its sandbox pauses, ends, and runs again on another host under the same id."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.model.ids import HostId
from fleet.model.sandbox import ENDED_PHASES
from fleet.store.keyspace import (
    alive_key,
    charged_key,
    cordon_key,
    host_key,
    losses_key,
    meter_key,
    reservation_key,
)
from provisioning.embedded.etcd import free_ports
from provisioning.embedded.fleet import EmbeddedFleet
from provisioning.embedded.libvirt import LIBVIRT_URI
from provisioning.embedded.pki import EMBEDDED_HOST, SECOND_HOST
from provisioning.embedded.process import start_program
from tests.e2e.operate import COUNTED, COUNTER, Done, Tenant, forget, wait_until
from tests.e2e.relay import Relay

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]


@pytest.fixture
def relay(fleet: EmbeddedFleet) -> Iterator[Relay]:
    """The first host's way to etcd."""
    config = fleet.folder / "hostd.toml"
    plain = config.read_text()
    relay = Relay(fleet.endpoint)
    fleet.hostd.stop()
    config.write_text(plain.replace(f'etcd = ["{fleet.endpoint}"]', f'etcd = ["{relay.address}"]'))
    fleet.start_hostd()
    yield relay
    fleet.hostd.stop()
    relay.close()
    config.write_text(plain)
    fleet.start_hostd()


@pytest.fixture
def second(fleet: EmbeddedFleet, tenant: Tenant, tmp_path: Path) -> Iterator[str]:
    """A second host, alive, whose VMs are simulated; told as a host in what is started here."""
    folder = tmp_path / SECOND_HOST
    folder.mkdir()
    images = next(line for line in (fleet.folder / "hostd.toml").read_text().splitlines() if "images_dir" in line)
    settings = {"pki": str(fleet.folder / "pki"), "etcd": fleet.endpoint, "port": free_ports(1)[0], "count": 4}
    (folder / "settings.json").write_text(json.dumps({**settings, "images": images.split('"')[1]}))
    log = tmp_path / "second.log"
    arguments = [sys.executable, "-m", "benchmarks.simulated", str(folder)]
    program = start_program(SECOND_HOST, arguments, log, lambda: '"host.registered"' in log.read_text())
    yield SECOND_HOST
    # What a test that failed has left there goes only while the host lives.
    tenant.clear()
    program.stop()
    gone = HostId(SECOND_HOST)
    makers = (host_key, alive_key, reservation_key, losses_key, cordon_key, meter_key, charged_key)
    forget(fleet, *(key_of(gone) for key_of in makers))


@pytest.fixture
def operator(fleet: EmbeddedFleet, tmp_path: Path) -> Tenant:
    """The fleet's operator."""
    return Tenant(fleet, tmp_path, fleet.operator_config)


def domain_state(sandbox_id: str) -> str:
    arguments = ["virsh", "--connect", LIBVIRT_URI, "domstate", f"bp-{sandbox_id}"]
    return subprocess.run(arguments, capture_output=True, text=True, check=False).stdout.strip()


def host_of(operator: Tenant, host_id: str) -> Any:
    done: Done = operator.run("host", "ls", "--json")
    return next((one for one in done.json() if one["record"]["host_id"] == host_id), None)


def test_a_sandbox_of_a_lost_host_runs_on_another(
    tenant: Tenant, operator: Tenant, relay: Relay, request: pytest.FixtureRequest
) -> None:
    """Paused, killed, lost, placed anew: never on two hosts. The host that is back clears away what it had, and waits a while."""
    folder = tenant.write_project("moves", ["sleep", "600"], agent='restart = "on-failure"')
    tenant.up(folder)
    before = tenant.status("moves")
    sandbox_id = before["sandbox_id"]
    assert (before["host_id"], before["placement"]) == (EMBEDDED_HOST, 1)
    second = request.getfixturevalue("second")
    with relay.cut():
        wait_until(lambda: domain_state(sandbox_id), lambda state: state == "paused")
        wait_until(lambda: domain_state(sandbox_id), lambda state: state == "")
        lost = tenant.until("moves", lambda found: found["phase"] == "lost" or found["host_id"] == second)
        assert (lost["sandbox_id"], lost["run"]) == (sandbox_id, 1)
        after = tenant.until("moves", lambda found: found["host_id"] == second and found["phase"] == "running")
        assert domain_state(sandbox_id) == ""
        assert (after["sandbox_id"], after["run"], after["placement"]) == (sandbox_id, 1, 2)
        assert after["reason"]["code"] == "host_lost"
        assert re.search(r"^placement +2: its host local was lost$", tenant.run("status", "moves").out, re.MULTILINE)
    wait_until(
        lambda: host_of(operator, EMBEDDED_HOST), lambda found: found["is_alive"] and found["losses"] is not None
    )
    left = [tenant.fleet.folder / "state" / name / sandbox_id for name in ("orders", "sandboxes")]
    wait_until(lambda: [path.exists() for path in left], lambda found: not any(found))
    assert tenant.status("moves")["phase"] == "running"
    tenant.destroy("moves")


def test_a_drained_host_gives_its_sandboxes_away(
    tenant: Tenant, operator: Tenant, request: pytest.FixtureRequest
) -> None:
    """What may move runs elsewhere under the same id; what may not is waited for, told why, and stopped when that is forced."""
    tenant.up(tenant.write_project("goes", ["sleep", "600"], agent='restart = "on-failure"'))
    tenant.up(tenant.write_project("waits", ["sleep", "600"]))
    second = request.getfixturevalue("second")
    assert operator.run("host", "drain", EMBEDDED_HOST).code == 0
    moved = tenant.until("goes", lambda found: found["host_id"] == second and found["phase"] == "running")
    assert (moved["placement"], moved["reason"]["code"]) == (2, "host_drained")
    told = operator.run("host", "drain", EMBEDDED_HOST).out
    assert "1 left, 0 moving" in told
    assert "waits of" in told
    done = operator.run("host", "drain", EMBEDDED_HOST, "--force", "--wait")
    assert (done.code, "nothing runs there" in done.out) == (0, True), done
    ended = tenant.status("waits")
    assert (ended["phase"], ended["reason"]["code"]) == ("stopped", "host_drained")
    assert operator.run("host", "uncordon", EMBEDDED_HOST).code == 0
    tenant.destroy("goes", "waits")


def test_what_had_begun_and_does_not_restart_ends_with_its_host(tenant: Tenant, relay: Relay) -> None:
    """It has failed with the reason, for its owner too while the host is away, and stays so when the host is back."""
    tenant.up(tenant.write_project("ends", ["sleep", "600"]))
    with relay.cut():
        ended = tenant.until("ends", lambda found: found["phase"] in ENDED_PHASES)
        assert (ended["phase"], ended["status"]["reason"]["code"]) == ("failed", "host_lost")
    tenant.until("ends", lambda found: found["status"]["released"])
    assert tenant.status("ends")["phase"] == "failed"
    assert "host was lost" in tenant.run("start", "ends").err
    tenant.destroy("ends")


def test_a_way_that_is_back_in_time_costs_a_pause(tenant: Tenant, relay: Relay, fleet: EmbeddedFleet) -> None:
    """The lease is renewed before the kill: the same VM runs on, and not a line of its output is lost."""
    folder = tenant.write_project("stays", ["python3", "count.py"], {"count.py": COUNTER})
    with tenant.start("up", str(folder)) as up:
        up.until_printed("line 5\n")
        sandbox_id = tenant.status("stays")["sandbox_id"]
        with relay.cut():
            wait_until(lambda: domain_state(sandbox_id), lambda state: state == "paused")
        wait_until(lambda: domain_state(sandbox_id), lambda state: state == "running")
        done = up.wait()
    assert (done.code, done.out) == (0, COUNTED), done
    assert tenant.status("stays")["placement"] == 1
    assert fleet.hostd.process.poll() is None
    tenant.destroy("stays")
