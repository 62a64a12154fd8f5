"""A host from its token to its VMs, its certificate replaced under a running sandbox, and what its doctor says."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.certificates import certificate_span, issue_certificate
from fleet.credentials import install
from fleet.identity import Identity, KeyPair, Role, TlsFiles
from provisioning.embedded.fleet import EmbeddedFleet
from provisioning.embedded.pki import EMBEDDED_HOST, tls_files
from tests.e2e.operate import Done, Tenant, wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]
LIFETIME = datetime.timedelta(seconds=60)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@pytest.fixture
def operator(fleet: EmbeddedFleet, tmp_path: Path) -> Tenant:
    """The fleet's operator."""
    return Tenant(fleet, tmp_path, fleet.operator_config)


def doctor(fleet: EmbeddedFleet) -> Done:
    """`mb host doctor` on the fleet's host."""
    config = fleet.folder / "hostd.toml"
    arguments = [sys.executable, "-m", "mb", "host", "doctor", "--config", str(config), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_host_from_token_to_sandbox(fleet: EmbeddedFleet, tenant: Tenant, operator: Tenant) -> None:
    """Token, enrolment, doctor, hostd: under a certificate that it got itself the host carries a sandbox."""
    config = fleet.folder / "hostd.toml"
    before = config.read_text()
    token, out = operator.folder / "token", operator.folder / "enrolled"
    token.write_text(operator.run("host", "token", EMBEDDED_HOST, "--ttl", "5m").out)
    enrol = ("host", "enrol", "--token-file", str(token), "--scheduler", fleet.enrolment_address, "--out", str(out))
    done = operator.run(*enrol)
    assert done.code == 0, done.err
    files = TlsFiles(out / "ca.crt", out / "host.crt", out / "host.key")
    old = tls_files(fleet.folder / "pki", Role.HOST, EMBEDDED_HOST)
    text = before.replace(str(old.ca), str(files.ca)).replace(str(old.certificate), str(files.certificate))
    fleet.hostd.stop()
    config.write_text(text.replace(str(old.key), str(files.key)))
    try:
        examined = doctor(fleet)
        findings = json.loads(examined.out)
        assert [one for one in findings if one["level"] == "fail"] == [], examined
        assert examined.code == 0
        assert {"certificate", "etcd", "scheduler", "clock", "libvirt", "image", "network"} <= {
            one["check"] for one in findings if one["level"] == "ok"
        }
        fleet.start_hostd()
        folder = tenant.write_project("first", ["sh", "-c", "echo carried"])
        assert tenant.run("up", str(folder)).out == "carried\n"
        tenant.destroy("first")
    finally:
        fleet.hostd.stop()
        config.write_text(before)
        fleet.start_hostd()


def test_a_certificate_is_replaced_under_a_running_sandbox(fleet: EmbeddedFleet, tenant: Tenant) -> None:
    """The host's certificate lives for a minute: hostd renews it, and its VM, the followed output and its lease go on."""
    files = tls_files(fleet.folder / "pki", Role.HOST, EMBEDDED_HOST)
    authority = KeyPair(files.ca.read_bytes(), (fleet.folder / "pki" / "ca.key").read_bytes())
    fleet.hostd.stop()
    short = issue_certificate(authority, Identity(Role.HOST, EMBEDDED_HOST), now(), ("127.0.0.1",), LIFETIME)
    install(files, short)
    ends = certificate_span(short.certificate)[1]
    fleet.start_hostd()
    log_before = len(fleet.hostd.log.read_text())
    folder = tenant.write_project(
        "long", ["sh", "-c", "i=0; while [ ! -e stop ]; do echo $i; i=$((i+1)); sleep 1; done"]
    )
    assert tenant.run("up", str(folder), "--detach").code == 0
    with tenant.start("logs", "long", "--follow") as follower:
        wait_until(now, lambda moment: moment > ends + datetime.timedelta(seconds=5))
        printed = tenant.run("logs", "long").out.splitlines()
        follower.until_printed(f"\n{printed[-1]}\n")
    assert [int(line) for line in printed] == list(range(len(printed)))
    assert files.load()[1].certificate != short.certificate
    assert tenant.status("long")["phase"] == "running"
    said = fleet.hostd.log.read_text()[log_before:]
    assert "certificate.renewed" in said
    assert "lease.lost" not in said
    tenant.destroy("long")
