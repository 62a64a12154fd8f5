"""Files of a certificate that are replaced: whole at every moment, and taken up only when they belong together."""

import datetime
from pathlib import Path

import pytest

from fleet.certificates import check_files, create_authority, issue_certificate
from fleet.credentials import LOOK_S, LiveCredentials, finish_install, install, write_file
from fleet.errors import HostFaultError
from fleet.identity import Identity, KeyPair, Role, TlsFiles

NOW = datetime.datetime.now(datetime.UTC)
AUTHORITY = create_authority(NOW)
MINE = Identity(Role.HOST, "rack1-07")
OLD, NEW = (issue_certificate(AUTHORITY, MINE, NOW) for _ in range(2))


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    """The old pair in place."""
    made = TlsFiles(tmp_path / "ca.crt", tmp_path / "host.crt", tmp_path / "host.key")
    made.ca.write_bytes(AUTHORITY.certificate)
    install(made, OLD)
    return made


def pair_in(files: TlsFiles) -> KeyPair:
    return files.load()[1]


def test_a_pair_is_installed(files: TlsFiles) -> None:
    """The key for its owner's eyes only, nothing left beside the files."""
    install(files, NEW)
    assert pair_in(files) == NEW
    assert (files.key.stat().st_mode & 0o777, files.certificate.stat().st_mode & 0o777) == (0o600, 0o644)
    assert sorted(path.name for path in files.ca.parent.iterdir()) == ["ca.crt", "host.crt", "host.key"]
    check_files(files, MINE, NOW)


@pytest.mark.parametrize("done", ["nothing", "key", "key and certificate"])
def test_an_install_that_was_cut_short_is_finished(files: TlsFiles, done: str) -> None:
    """Whatever was replaced when the machine went down, the next start has a pair that belongs together."""
    write_file(files.certificate.with_name("host.crt.next"), NEW.key + NEW.certificate, 0o600)
    if "key" in done:
        files.key.write_bytes(NEW.key)
    if "certificate" in done:
        files.certificate.write_bytes(NEW.certificate)
    finish_install(files)
    assert pair_in(files) == NEW
    finish_install(files)
    check_files(files, MINE, NOW)


def test_a_folder_that_takes_no_files(files: TlsFiles, tmp_path: Path) -> None:
    """A failed install is told by path, and the old pair is in place."""
    elsewhere = TlsFiles(files.ca, tmp_path / "gone" / "host.crt", tmp_path / "gone" / "host.key")
    with pytest.raises(HostFaultError, match="gone") as caught:
        install(elsewhere, NEW)
    assert caught.value.code == "files_unwritable"
    assert pair_in(files) == OLD


def test_new_files_are_taken_up(files: TlsFiles) -> None:
    """At the first look after LOOK_S, once; the same content again is no change."""
    now = 0.0
    live = LiveCredentials(files, lambda: now)
    install(files, NEW)
    assert live.refresh() == 0
    now += LOOK_S
    assert live.refresh() == 1
    install(files, NEW)
    now += LOOK_S
    assert live.refresh() == 1


def test_half_a_change_is_passed_over(files: TlsFiles) -> None:
    """A key without its certificate, damage and a missing file leave the old credentials; the whole set is taken up then."""
    now = 0.0
    live = LiveCredentials(files, lambda: now)

    def look() -> int:
        nonlocal now
        now += LOOK_S
        return live.refresh()

    files.key.write_bytes(NEW.key)
    assert look() == 0
    files.certificate.write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    assert look() == 0
    files.certificate.unlink()
    assert look() == 0
    files.ca.write_bytes(create_authority(NOW).certificate)
    files.certificate.write_bytes(NEW.certificate)
    assert look() == 0
    files.ca.write_bytes(AUTHORITY.certificate)
    files.certificate.write_bytes(NEW.certificate)
    assert look() == 1


def test_a_stray_file_beside_the_certificate(files: TlsFiles) -> None:
    """What no install has left there is told by name, and touches nothing."""
    files.certificate.with_name("host.crt.next").write_bytes(b"noise")
    with pytest.raises(HostFaultError, match=r"host\.crt\.next"):
        finish_install(files)
    assert pair_in(files) == OLD
