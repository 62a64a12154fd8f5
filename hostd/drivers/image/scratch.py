"""Scratch disks: sparse raw files with an empty ext4 in them, made by the host and never mounted by it."""

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fleet.errors import HostFaultError
from fleet.model.ids import SandboxId, is_sandbox_id
from fleet.model.units import MIB
from hostd.drivers.image.command import run_command
from hostd.files import disk_faults

SUFFIX = ".raw"
# A disk under way: nobody lists it, so whoever fails to finish it, or finds it at the start, removes it.
UNFINISHED = ".new"
# mke2fs takes no less than 1024 blocks of 4 KiB.
JOURNAL_MIB = 4


class ScratchDisks:
    """One file for each sandbox that has a VM, or had one and is stopped; `owner` is the user and group QEMU runs as."""

    def __init__(self, scratch_dir: Path, owner: tuple[int, int]) -> None:
        self._dir = scratch_dir
        self._owner = owner
        scratch_dir.mkdir(parents=True, exist_ok=True)
        # QEMU runs unprivileged and passes through; names are not secret, contents are the file's own mode.
        scratch_dir.chmod(0o711)
        for leftover in scratch_dir.glob("*" + UNFINISHED):
            leftover.unlink()

    async def list_scratch(self) -> frozenset[SandboxId]:
        """Sandboxes that have a scratch disk."""
        names = [path.name.removesuffix(SUFFIX) for path in self._dir.glob("*" + SUFFIX)]
        return frozenset(SandboxId(name) for name in names if is_sandbox_id(name))

    async def ensure_scratch(self, sandbox_id: SandboxId, size_mib: int) -> str:
        """The path of the sandbox's scratch disk; made sparse, so it takes what the guest writes and no more than its size."""
        path = self._path(sandbox_id)
        if path.exists():
            return str(path)
        temporary = path.with_suffix(UNFINISHED)
        try:
            await self._make(temporary, size_mib)
            temporary.replace(path)
        except OSError as error:
            message = f"{temporary}: {error.strerror}"
            raise HostFaultError("scratch_failed", message, "free space on the host") from error
        finally:
            temporary.unlink(missing_ok=True)
        return str(path)

    async def measure_scratch(self) -> Mapping[SandboxId, int]:
        """What each disk takes of the host's, in MiB."""
        found = {}
        for sandbox_id in await self.list_scratch():
            with suppress(FileNotFoundError):
                # st_blocks counts 512 bytes each, whatever the filesystem's own block is (stat(2)).
                found[sandbox_id] = -(-self._path(sandbox_id).stat().st_blocks * 512 // MIB)
        return found

    async def keep_scratch(self, sandbox_id: SandboxId) -> None:
        """Make durable what the VM wrote: QEMU left it in the page cache (domain_xml: cache=unsafe)."""
        with disk_faults(self._path(sandbox_id)), suppress(FileNotFoundError):
            await asyncio.to_thread(_sync, self._path(sandbox_id))

    async def remove_scratch(self, sandbox_id: SandboxId) -> None:
        """Delete the scratch disk."""
        await asyncio.to_thread(self._path(sandbox_id).unlink, missing_ok=True)

    async def _make(self, temporary: Path, size_mib: int) -> None:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.truncate(size_mib * MIB)
        # A journal, for a sandbox that was cut off may be started again; the smallest, for a guest has no flush to wait for
        # and hundreds of these disks share a host's. Nothing is reserved for root. mke2fs discards the
        # (empty) file first and so leaves tables as holes: 2 MiB for a disk of 20 GiB, which without it were 329 MiB.
        features = "has_journal,^resize_inode,^metadata_csum"
        extended = "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"
        arguments = ("-q", "-F", "-m", "0", "-J", f"size={JOURNAL_MIB}", "-O", features, "-E", extended, str(temporary))
        await run_command("scratch_failed", "mke2fs", "-t", "ext4", *arguments)
        os.chown(temporary, *self._owner)

    def _path(self, sandbox_id: SandboxId) -> Path:
        return self._dir / (sandbox_id + SUFFIX)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
