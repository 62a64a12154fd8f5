"""`mb host` as an operator runs it: a process of its own, over mutual TLS, against a real scheduler."""

import asyncio
import datetime
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet.certificates import check_files, create_authority, issue_certificate
from fleet.credentials import install
from fleet.enrolment import parse_token
from fleet.identity import Identity, KeyPair, Role, TlsFiles
from fleet.model.ids import HostId
from fleet.store.keyspace import cordon_key
from fleet.store.memory import MemoryStore
from mb.exits import Exit
from provisioning.embedded.pki import create_pki, tls_files
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


async def test_a_host_is_drained(operator: Mb, mb: Mb, store: MemoryStore) -> None:
    """An empty one at once, with and without waiting; it is cordoned, says so, and a cordon afterwards ends the drain."""
    done = await operator.run("host", "drain", "local", "--moves", "3", "--reason", "new disks")
    assert (done.code, done.stdout) == (Exit.OK, "local is drained: nothing runs there\n")
    shown = (await operator.run("host", "ls")).stdout
    assert shown.splitlines()[1].split()[:2] == ["local", "draining"]
    assert "3 at a time" in shown
    found = (await operator.run("host", "drain", "local", "--force", "--wait", "--json")).value()
    assert (found["left"], found["moving"], found["stragglers"]) == (0, 0, [])
    assert found["host"]["cordon"]["is_forced"]
    await operator.run("host", "cordon", "local")
    assert "cordoned by operator" in (await operator.run("host", "ls")).stdout
    assert (await operator.run("host", "drain", "gone", "--json")).error()["code"] == "host_unknown"
    assert (await mb.run("host", "drain", "local", "--json")).error()["code"] == "role_not_permitted"
    assert (await operator.run("host", "uncordon", "local", "--json")).value()["cordon"] is None
    assert await store.get(cordon_key(HostId("local"))) is None


async def test_what_cannot_be_cordoned(operator: Mb, mb: Mb) -> None:
    """A host that is not there, a reason that is a page, and a tenant's certificate are refused by name."""
    assert (await operator.run("host", "cordon", "gone", "--json")).error()["code"] == "host_unknown"
    long = await operator.run("host", "cordon", "local", "--reason", "x" * 201, "--json")
    assert (long.code, long.error()["field"]) == (Exit.INVALID, "reason")
    assert (await mb.run("host", "cordon", "local", "--json")).error()["code"] == "role_not_permitted"


async def test_a_host_is_enrolled(operator: Mb, mb: Mb, fleet: Fleet, tmp_path: Path) -> None:
    """Operator's token to host's files in two commands; the secret is on stdout only, and the key for its owner's eyes."""
    token = await operator.run("host", "token", "rack1-07", "--ttl", "5m")
    assert (token.code, len(token.stdout.splitlines())) == (Exit.OK, 1)
    assert token.stdout.strip() not in token.stderr
    file, out = tmp_path / "token", tmp_path / "etc"
    file.write_text(token.stdout)
    arguments = ("host", "enrol", "--token-file", file, "--scheduler", fleet.enrolment_address, "--out", out)
    done = await mb.run(*arguments)
    assert (done.code, 'host_id = "rack1-07"' in done.stdout, "next: mb host doctor" in done.stdout) == (
        Exit.OK,
        True,
        True,
    )
    files = TlsFiles(out / "ca.crt", out / "host.crt", out / "host.key")
    check_files(files, Identity(Role.HOST, "rack1-07"), datetime.datetime.now(datetime.UTC))
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in out.iterdir()) == ["ca.crt", "host.crt", "host.key"]
    assert (await mb.run(*arguments, "--json")).error()["code"] == "files_exist"
    piped = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mb", "host", "enrol", "--token-file", "-", "--scheduler", fleet.enrolment_address),
        *("--out", str(tmp_path / "piped")),
        stdin=asyncio.subprocess.PIPE,
    )
    second = await operator.run("host", "token", "rack1-08")
    await piped.communicate(second.stdout.encode())
    assert (piped.returncode, (tmp_path / "piped" / "host.key").exists()) == (Exit.OK, True)
    assert (await mb.run(*arguments, "--force", "--json")).error()["code"] == "token_used"


async def test_a_scheduler_of_another_authority_gets_no_secret(
    operator: Mb, mb: Mb, fleet: Fleet, tmp_path: Path
) -> None:
    """A token that names another authority is not sent: the mismatch is told before anything is asked."""
    token = parse_token((await operator.run("host", "token", "rack1-07", "--json")).value()["token"])
    (tmp_path / "token").write_text(replace(token, ca_sha256="0" * 64).render())
    arguments = [
        "host",
        "enrol",
        "--token-file",
        tmp_path / "token",
        "--out",
        tmp_path / "etc",
        "--json",
        "--scheduler",
    ]
    refused = await mb.run(*arguments, fleet.enrolment_address)
    assert (refused.code, refused.error()["code"]) == (Exit.ERROR, "authority_mismatch")
    assert not (tmp_path / "etc").exists()
    for address, code, exit_code in (
        ("127.0.0.1:1", "unreachable", Exit.UNREACHABLE),
        ("nowhere", "address_invalid", Exit.INVALID),
    ):
        ended = await mb.run(*arguments, address)
        assert (ended.code, ended.error()["code"]) == (exit_code, code)
    (tmp_path / "token").write_text("noise")
    wrong = await mb.run(*arguments, fleet.enrolment_address)
    assert (wrong.code, wrong.error()["code"]) == (Exit.INVALID, "token_invalid")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Certificates that a test may withdraw."""
    create_pki(tmp_path / "own")
    return tmp_path / "own"


async def test_a_certificate_is_withdrawn(store: MemoryStore, own: Path, tmp_path: Path) -> None:
    """In the folder, then in the fleet: the tenant is told so and with which exit code; both commands are safe to repeat."""
    async with Fleet(store, own).running() as fleet:
        await fleet.answers()
        operator, tenant = Mb(fleet, tmp_path, Role.OPERATOR, "operator"), Mb(fleet, tmp_path)
        assert (await tenant.run("ls")).code == Exit.OK
        assert (await operator.run("pki", "publish", own)).stdout == "0 newly refused, 0 refused before\n"
        for _ in range(2):
            done = await operator.run("pki", "revoke", own, "tenant-demo", "--json")
            assert (done.code, done.value()["entries"]) == (Exit.OK, 1)
        assert (await operator.run("pki", "publish", own, "--json")).value() == {"added": 1, "known": 0}
        assert (await operator.run("pki", "publish", own, "--json")).value() == {"added": 0, "known": 1}
        refused = await tenant.run("ls", "--json")
        assert (refused.code, refused.error()["code"]) == (Exit.ERROR, "certificate_revoked")


async def test_a_host_is_revoked(operator: Mb, fleet: Fleet, tmp_path: Path) -> None:
    """With the serials that schedulers have signed for it, to be put into etcd's list, and by hand where there is none."""
    token = await operator.run("host", "token", "rack1-07")
    (tmp_path / "token").write_text(token.stdout)
    arguments = ("--token-file", tmp_path / "token", "--scheduler", fleet.enrolment_address, "--out", tmp_path / "etc")
    await operator.run("host", "enrol", *arguments)
    shown = await operator.run("pki", "show", tmp_path / "etc" / "host.crt", "--json")
    done = await operator.run("host", "revoke", "rack1-07", "--reason", "stolen")
    assert f"mb pki revoke FOLDER --serial {shown.value()['serial']}" in done.stdout
    assert (await operator.run("host", "revoke", "gone", "--json")).error()["code"] == "host_unknown"


def rewrite(files: TlsFiles, authority: KeyPair, **changes: Any) -> None:
    """Replaces a certificate by one that something is wrong with."""
    now = datetime.datetime.now(datetime.UTC)
    install(files, issue_certificate(authority, Identity(Role.TENANT, "demo"), changes.get("now", now)))


async def test_a_certificate_that_is_wrong_is_named(store: MemoryStore, own: Path, tmp_path: Path) -> None:
    """Expired, of another authority, or trusting another one: each is told as what it is, not as a scheduler that is away."""
    now = datetime.datetime.now(datetime.UTC)
    authority, foreign = KeyPair((own / "ca.crt").read_bytes(), (own / "ca.key").read_bytes()), create_authority(now)
    async with Fleet(store, own).running() as fleet:
        await fleet.answers()
        elsewhere = tmp_path / "elsewhere"
        create_pki(elsewhere)
        whole, tenant = Mb(fleet, tmp_path), tls_files(own, Role.TENANT, "demo")

        async def error_of(mb: Mb) -> tuple[int, str]:
            ended = await mb.run("ls", "--json")
            assert "ipv4:" not in ended.stderr
            return ended.code, ended.error()["code"]

        rewrite(tenant, authority, now=now - datetime.timedelta(days=400))
        assert await error_of(whole) == (Exit.INVALID, "certificate_expired")
        rewrite(tenant, foreign)
        assert await error_of(whole) == (Exit.INVALID, "certificate_foreign")
        fleet.pki = elsewhere
        assert await error_of(Mb(fleet, tmp_path)) == (Exit.INVALID, "server_untrusted")
        # A client that trusts this fleet and comes from another: the server is the one that refuses.
        both = elsewhere / "ca.crt"
        both.write_bytes(both.read_bytes() + authority.certificate)
        assert await error_of(Mb(fleet, tmp_path)) == (Exit.ERROR, "certificate_refused")
        fleet.pki = own
    rewrite(tenant, authority)
    ended = await Mb(fleet, tmp_path).run("ls", "--json")
    assert (ended.code, ended.error()["code"]) == (Exit.UNREACHABLE, "unreachable")
    assert "Connection refused" in ended.error()["message"]
