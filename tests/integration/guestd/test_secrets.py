"""Secrets on a real tmpfs: where their values are, and that they are nowhere else."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestd.fault import GuestFault
from guestd.secrets import SECRETS_MAX, VALUE_BYTES_MAX, Secrets

pytestmark = [pytest.mark.root]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where secrets go; unmounted afterwards."""
    path = tmp_path / "secrets"
    yield path
    if os.path.ismount(path):
        subprocess.run(["umount", str(path)], check=True)


def test_a_secret_is_the_agents_to_read_and_on_no_disk(folder: Path) -> None:
    """A tmpfs of its own that forbids programs and devices; 0500 and 0400, owned by the agents' user; the last value counts."""
    secrets = Secrets(str(folder))
    secrets.put("TOKEN", b"first")
    secrets.put("TOKEN", b"second\0\xff")
    about = folder.stat()
    file = (folder / "TOKEN").stat()
    assert (stat.S_IMODE(about.st_mode), about.st_uid, stat.S_IMODE(file.st_mode), file.st_uid) == (
        0o500,
        1001,
        0o400,
        1001,
    )
    assert (folder / "TOKEN").read_bytes() == b"second\0\xff"
    (line,) = [line for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[1] == str(folder)]
    assert line.split()[2] == "tmpfs"
    assert {"nosuid", "nodev", "noexec"} <= set(line.split()[3].split(","))
    assert [path.name for path in folder.iterdir()] == ["TOKEN"]


def test_a_restarted_guestd_finds_them(folder: Path) -> None:
    """Values outlive guestd, not the boot; what is missing is named, what is there is enough."""
    Secrets(str(folder)).put("ONE", b"1")
    again = Secrets(str(folder))
    again.require(["ONE"])
    with pytest.raises(GuestFault, match="secrets THREE, TWO") as caught:
        again.require(["TWO", "ONE", "THREE"])
    assert caught.value.code == "secrets_missing"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "lower", "1ST", ".HIDDEN", "X" * 65])
def test_a_name_leads_nowhere_else(folder: Path, name: str) -> None:
    """Only names of variables are files here."""
    with pytest.raises(ValueError, match="name"):
        Secrets(str(folder)).put(name, b"x")
    assert not folder.exists()


def test_values_fit_and_are_bounded(folder: Path) -> None:
    """As many bytes as admission allows fit, replaced as well; one more secret or byte is refused."""
    secrets = Secrets(str(folder))
    for number in range(SECRETS_MAX):
        secrets.put(f"S{number}", bytes(VALUE_BYTES_MAX if number < 4 else 1))
    secrets.put("S0", bytes(VALUE_BYTES_MAX))
    with pytest.raises(ValueError, match="too many"):
        secrets.put("MORE", b"")
    with pytest.raises(ValueError, match="too long"):
        secrets.put("S0", bytes(VALUE_BYTES_MAX + 1))
