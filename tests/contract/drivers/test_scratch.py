"""The real Disks: sparse files with an empty ext4, none left half made. tests/contract/drivers/test_hypervisor.py has the rest."""

import os
import subprocess
from pathlib import Path

import pytest

from fleet.errors import HostFaultError
from fleet.model.ids import SandboxId
from hostd.drivers.image import ScratchDisks
from hostd.drivers.image.command import TAIL_BYTES, run_command

A = SandboxId("aaaaaaaaaaaa")
OWNER = (os.getuid(), os.getgid())


@pytest.mark.root
async def test_a_scratch_disk_is_an_empty_ext4(tmp_path: Path) -> None:
    """As large as asked, sparse, private to QEMU's user, whole by e2fsck's word; a second ensure leaves it as it is."""
    disks = ScratchDisks(tmp_path, (64055, 64055))
    path = Path(await disks.ensure_scratch(A, 64))
    status = path.stat()
    assert (status.st_size, status.st_mode & 0o777, status.st_uid) == (64 * 2**20, 0o600, 64055)
    assert status.st_blocks * 512 < 8 * 2**20
    subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)
    path.write_bytes(b"used")
    assert await disks.ensure_scratch(A, 128) == str(path)
    assert path.read_bytes() == b"used"
    assert await disks.list_scratch() == {A}
    await disks.remove_scratch(A)
    await disks.remove_scratch(A)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size_mib", [0, 2**42], ids=["nothing", "more than a file can be"])
async def test_a_disk_that_cannot_be_made_leaves_nothing(tmp_path: Path, size_mib: int) -> None:
    """The failure names its step, and no part of the disk stays."""
    disks = ScratchDisks(tmp_path, OWNER)
    with pytest.raises(HostFaultError) as caught:
        await disks.ensure_scratch(A, size_mib)
    assert caught.value.code == "scratch_failed"
    assert list(tmp_path.iterdir()) == []


async def test_a_start_clears_what_a_crash_left(tmp_path: Path) -> None:
    """A disk whose making a kill -9 cut short is not listed, and gone at the next start; a finished one stays."""
    (tmp_path / f"{A}.new").touch()
    (tmp_path / f"{A}.raw").touch()
    (tmp_path / "notes.raw").touch()
    disks = ScratchDisks(tmp_path, OWNER)
    assert await disks.list_scratch() == {A}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{A}.raw", "notes.raw"]


async def test_a_program_that_fails_has_the_last_word() -> None:
    """Much output is read and thrown away but for its end, which the error repeats."""
    with pytest.raises(HostFaultError, match=r"ended with code 3: .*the end$") as caught:
        await run_command("step_failed", "sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x; echo the end; exit 3")
    assert caught.value.code == "step_failed"
    assert len(caught.value.message) < TAIL_BYTES + 100


@pytest.mark.parametrize("program", ["no-such-program", "/etc/passwd", "/etc/passwd/x"])
async def test_a_program_that_is_not_there(program: str) -> None:
    """A host without a program fails at that step and says which."""
    with pytest.raises(HostFaultError, match=program) as caught:
        await run_command("step_failed", program)
    assert "install" in caught.value.next_step
