"""Sources on this host: kept as received (a tar that its digest names) and as the EROFS disk a guest sees.

    <sources>/<tenant>/<hex>/{source.tar,disk.erofs,disk.digest}

Each tenant has a store of its own: nobody learns from an upload what another tenant has.
"""

import asyncio
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from fleet.errors import HostFaultError, InvalidSpecError, NotFoundError
from fleet.model.admission import SOURCE_BYTES_MAX
from fleet.model.ids import Digest, Tenant, digest_hex, is_digest, is_dns_label
from fleet.model.units import MIB
from hostd.drivers.image.command import run_command
from hostd.drivers.image.untar import unpack_source
from hostd.files import sync_folder

# In the guest everything belongs to the user `agent` (uid and gid 1001, provisioning/recipes/base.toml).
AGENT_ID = "1001"
# One fixed identity: the same tree gives the same disk.
EROFS_UUID = "0bed91a7-50ce-4000-8000-00000000d15c"
# Uploads stop before the disk is full, so that running sandboxes can go on writing.
FREE_BYTES_MIN = 512 * MIB

_RESEND = "upload it again with mb up"


class SourceStore:
    """The sources folder. A source is complete, verified and durable, or it is not there."""

    def __init__(self, sources_dir: Path) -> None:
        self._dir = sources_dir
        sources_dir.mkdir(parents=True, exist_ok=True)
        sources_dir.chmod(0o711)
        for leftover in sources_dir.glob(".incoming-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def list_sources(self) -> list[tuple[Tenant, Digest]]:
        """Every source held, with its tenant."""
        folders = sorted(self._dir.glob("*/*/disk.digest"))
        return [(Tenant(path.parts[-3]), Digest("sha256:" + path.parts[-2])) for path in folders]

    def has(self, tenant: Tenant, digest: Digest) -> bool:
        """Whether the source is held."""
        return (self._folder(tenant, digest) / "disk.digest").is_file()

    def tar_path(self, tenant: Tenant, digest: Digest) -> Path:
        """The source as it was received; raises NotFoundError when it is not held."""
        if not self.has(tenant, digest):
            raise NotFoundError("source_unknown", f"source {digest} is not on this host", _RESEND)
        return self._folder(tenant, digest) / "source.tar"

    async def put(self, tenant: Tenant, digest: Digest, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
        """Takes a source in; raises InvalidSpecError when it is not what its digest and size say, or no clean tar."""
        if self.has(tenant, digest):
            return
        if size_bytes > SOURCE_BYTES_MAX:
            message = f"{size_bytes} bytes are more than {SOURCE_BYTES_MAX}"
            raise InvalidSpecError("source_too_large", message, "send less, or split it", field="size_bytes")
        if shutil.disk_usage(self._dir).free < size_bytes * 3 + FREE_BYTES_MIN:
            raise HostFaultError("disk_full", "this host has no room for the source", "free space on the host")
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=self._dir, ignore_cleanup_errors=True) as name:
            incoming = Path(name)
            await _receive(incoming / "source.tar", digest, size_bytes, chunks)
            await _build_disk(incoming)
            self._publish(incoming, self._folder(tenant, digest))

    async def ensure_disk(self, tenant: Tenant, digest: Digest) -> str:
        """The path of the source's disk, read and compared with its digest now; raises HostFaultError `source_corrupt`."""
        folder = self._folder(tenant, digest)
        if not self.has(tenant, digest):
            raise NotFoundError("source_unknown", f"source {digest} is not on this host", _RESEND)
        expected = (folder / "disk.digest").read_text()
        actual = await asyncio.to_thread(_digest_file, folder / "disk.erofs")
        if actual != expected:
            message = f"{folder / 'disk.erofs'}: its digest is {actual}, it was made with {expected}"
            raise HostFaultError("source_corrupt", message, f"remove {folder} on the host and submit it again")
        return str(folder / "disk.erofs")

    def _publish(self, incoming: Path, folder: Path) -> None:
        folder.parent.mkdir(mode=0o711, exist_ok=True)
        incoming.chmod(0o711)
        with contextlib.suppress(FileExistsError):
            incoming.rename(folder)
        sync_folder(folder.parent)

    def _folder(self, tenant: Tenant, digest: Digest) -> Path:
        assert is_dns_label(tenant)
        assert is_digest(digest)
        return self._dir / tenant / digest_hex(digest)


async def _receive(path: Path, digest: Digest, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
    hasher, received = hashlib.sha256(), 0
    with path.open("xb") as stream:
        async for chunk in chunks:
            received += len(chunk)
            if received > size_bytes:
                break
            hasher.update(chunk)
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    if received != size_bytes or "sha256:" + hasher.hexdigest() != digest:
        message = f"what arrived is not {size_bytes} bytes of digest {digest}"
        raise InvalidSpecError("digest_mismatch", message, _RESEND, field="digest")


async def _build_disk(incoming: Path) -> None:
    tree = incoming / "tree"
    tree.mkdir()
    await asyncio.to_thread(unpack_source, incoming / "source.tar", tree)
    disk = incoming / "disk.erofs"
    owner = (f"--force-uid={AGENT_ID}", f"--force-gid={AGENT_ID}")
    await run_command(
        "source_failed", "mkfs.erofs", "-zlz4", "-T0", "-U", EROFS_UUID, *owner, "-x-1", str(disk), str(tree)
    )
    await asyncio.to_thread(shutil.rmtree, tree)
    disk.chmod(0o644)
    (incoming / "source.tar").chmod(0o600)
    (incoming / "disk.digest").write_text(await asyncio.to_thread(_digest_file, disk))
    os.sync()


def _digest_file(path: Path) -> str:
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
