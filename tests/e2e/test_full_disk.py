"""A host whose disk is full: what cannot be kept fails clearly, removal works all the same, and room heals everything."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from provisioning.embedded.fleet import EmbeddedFleet
from tests.e2e.operate import Tenant

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

# Steps in which the last room is taken; the smallest is a block of the filesystem.
FILL_STEPS = (64 * 1024**2, 1024**2, 64 * 1024, 4096)


@contextmanager
def full_disk(fleet: EmbeddedFleet) -> Iterator[None]:
    """Within it the filesystem of hostd's state has not a block left (tests/e2e/conftest.py gives it one of its own)."""
    filler = fleet.folder / "state" / "filler"
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        size = 0
        for step in FILL_STEPS:
            while _take(descriptor, size, step):
                size += step
        yield
    finally:
        os.close(descriptor)
        filler.unlink()


def _take(descriptor: int, offset: int, length: int) -> bool:
    try:
        os.posix_fallocate(descriptor, offset, length)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def test_a_full_host_disk_ends_clearly_and_heals(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """ENOSPC under a running sandbox: it fails with the reason and what to do, can be destroyed while the disk is full, and the
    next sandbox runs once there is room."""
    script = "echo begun; while [ ! -e /workspace/go ]; do sleep 0.2; done; while :; do seq 1 20000; sleep 0.1; done"
    tenant.up(tenant.write_project("drowned", ["sh", "-c", script]))
    tenant.until_logged("drowned", "begun")
    with full_disk(fleet):
        assert tenant.run("exec", "drowned", "--", "touch", "/workspace/go").code == 0
        ended = tenant.until("drowned", lambda found: found["phase"] == "failed")
        assert ended["status"]["reason"]["code"] == "host_disk_failed", ended["status"]
        assert "free space" in ended["status"]["reason"]["next_step"]
        assert tenant.run("logs", "drowned").out.startswith("begun\n")
        refused = tenant.run("up", str(tenant.write_project("refused", ["true"])), "--detach")
        assert refused.code in (1, 4), refused
        tenant.destroy("drowned")
    folder = tenant.write_project("afloat", ["echo", "room again"])
    done = tenant.run("up", str(folder), "--rm")
    assert (done.code, done.out) == (0, "room again\n"), done
