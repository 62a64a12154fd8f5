"""Sources on this host: kept as received (a tar that its digest names) and as the EROFS disk a guest sees.

    <sources>/<tenant>/<hex>/{source.tar,disk.erofs,disk.digest}

Each tenant has a store of its own: nobody learns from an upload what another tenant has.
"""

import asyncio
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fleet.errors import HostFaultError, InvalidSpecError, NotFoundError, UnavailableError
from fleet.model.admission import SOURCE_BYTES_MAX
from fleet.model.ids import Digest, Tenant, digest_hex, is_digest, is_dns_label
from fleet.model.units import MIB
from hostd.drivers.image.command import run_command
from hostd.drivers.image.unpack import unpack_apart
from hostd.files import disk_faults, sync_folder
from hostd.room import HeldSource

# In the guest everything belongs to the user `agent` (uid and gid 1001, provisioning/recipes/base.toml).
AGENT_ID = "1001"
# One fixed identity: the same tree gives the same disk.
EROFS_UUID = "0bed91a7-50ce-4000-8000-00000000d15c"
# Uploads stop before the disk is full, so that running sandboxes can go on writing.
FREE_BYTES_MIN = 512 * MIB
# An upload lies there as a tar, as a tree and as a disk at once.
COPIES = 3
# A sender that is slower, or sends nothing for so long, does not hold its place.
BYTES_PER_S_MIN = MIB // 8
RECEIVE_S_MIN = 120.0
CHUNK_TIMEOUT_S = 30.0

_RESEND = "upload it again with mb up"
_FILES = ("source.tar", "disk.erofs", "disk.digest")


class SourceStore:
    """The sources folder. A source is complete, verified and durable, or it is not there."""

    def __init__(self, sources_dir: Path) -> None:
        self._dir = sources_dir
        # What uploads under way may come to occupy: each is checked against what the others leave.
        self._expected_bytes = 0
        sources_dir.mkdir(parents=True, exist_ok=True)
        sources_dir.chmod(0o711)
        for leftover in sources_dir.glob(".incoming-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def list_sources(self) -> list[tuple[Tenant, Digest]]:
        """Every source held, with its tenant."""
        found = sorted(path.parts[-3:-1] for path in self._dir.glob("*/*/disk.digest"))
        # An upload under way is a folder here, too, and the names in it are the sender's.
        held = [(tenant, f"sha256:{name}") for tenant, name in found if is_dns_label(tenant)]
        return [(Tenant(tenant), Digest(digest)) for tenant, digest in held if is_digest(digest)]

    def list_held(self) -> list[HeldSource]:
        """Every source with what it occupies; one that goes meanwhile is left out."""
        found = []
        for tenant, digest in self.list_sources():
            folder = self._folder(tenant, digest)
            with suppress(FileNotFoundError):
                size_bytes = sum((folder / name).stat().st_blocks * 512 for name in _FILES)
                found.append(HeldSource(tenant, digest, size_bytes, (folder / "disk.digest").stat().st_mtime))
        return found

    def note_use(self, tenant: Tenant, digest: Digest) -> None:
        """The source is wanted: it stays for a while."""
        with suppress(FileNotFoundError):
            os.utime(self._folder(tenant, digest) / "disk.digest")

    def shortage_bytes(self, size_bytes: int) -> int:
        """How much more of the disk must be free for an upload of that size; zero or less when there is room."""
        needed = self._expected_bytes + size_bytes * COPIES + FREE_BYTES_MIN
        return needed - shutil.disk_usage(self._dir).free

    def remove(self, tenant: Tenant, digest: Digest) -> None:
        """Takes a source off the disk. A VM that runs from it keeps it open."""
        shutil.rmtree(self._folder(tenant, digest), ignore_errors=True)

    def has(self, tenant: Tenant, digest: Digest) -> bool:
        """Whether the source is held."""
        return (self._folder(tenant, digest) / "disk.digest").is_file()

    def tar_path(self, tenant: Tenant, digest: Digest) -> Path:
        """The source as it was received; raises NotFoundError when it is not held."""
        if not self.has(tenant, digest):
            raise NotFoundError("source_unknown", f"source {digest} is not on this host", _RESEND)
        return self._folder(tenant, digest) / "source.tar"

    async def put(self, tenant: Tenant, digest: Digest, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
        """Takes a source in; raises InvalidSpecError when it is not what its digest and size say, or no clean tar.

        Also HostFaultError `disk_full`, UnavailableError `source_stalled` for a sender that is too slow.
        """
        if self.has(tenant, digest):
            return
        if size_bytes > SOURCE_BYTES_MAX:
            message = f"{size_bytes} bytes are more than {SOURCE_BYTES_MAX}"
            raise InvalidSpecError("source_too_large", message, "send less, or split it", field="size_bytes")
        with (
            self._room(size_bytes),
            tempfile.TemporaryDirectory(prefix=".incoming-", dir=self._dir, ignore_cleanup_errors=True) as name,
        ):
            incoming = Path(name)
            await _receive(incoming / "source.tar", digest, size_bytes, chunks)
            await _build_disk(incoming)
            await _to_the_end(asyncio.to_thread(_publish, incoming, self._folder(tenant, digest)))

    async def ensure_disk(self, tenant: Tenant, digest: Digest) -> str:
        """The path of the source's disk, read and compared with its digest now.

        Raises HostFaultError `source_corrupt` when it is not what it was; it is thrown away then.
        """
        folder = self._folder(tenant, digest)
        if not self.has(tenant, digest):
            raise NotFoundError("source_unknown", f"source {digest} is not on this host", _RESEND)
        self.note_use(tenant, digest)
        disk = folder / "disk.erofs"
        try:
            expected = (folder / "disk.digest").read_text("ascii", "replace")
            actual = await asyncio.to_thread(_digest_file, disk)
        except OSError as error:
            fault = error.strerror or "it cannot be read"
        else:
            fault = f"its digest is {actual}, it was made with {expected[:80]}" if actual != expected else ""
        if fault:
            # A VM that still runs from it keeps it open; nobody else gets it, and it can be sent again.
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise _corrupt(disk, fault)
        return str(disk)

    @contextmanager
    def _room(self, size_bytes: int) -> Iterator[None]:
        """Within it so much of the disk is spoken for."""
        if self.shortage_bytes(size_bytes) > 0:
            raise HostFaultError("disk_full", "this host has no room for the source", "free space on the host")
        expected_bytes = size_bytes * COPIES
        self._expected_bytes += expected_bytes
        try:
            yield
        finally:
            self._expected_bytes -= expected_bytes

    def _folder(self, tenant: Tenant, digest: Digest) -> Path:
        assert is_dns_label(tenant)
        assert is_digest(digest)
        return self._dir / tenant / digest_hex(digest)


def _publish(incoming: Path, folder: Path) -> None:
    with disk_faults(folder):
        folder.parent.mkdir(exist_ok=True)
        folder.parent.chmod(0o711)
        incoming.chmod(0o711)
        for name in _FILES:
            _sync(incoming / name)
        sync_folder(incoming)
        if not _rename_into(incoming, folder):
            # Somebody else's upload of the same source was faster, or a removal was cut short and left a part of it.
            if (folder / "disk.digest").is_file():
                return
            shutil.rmtree(folder)
            _rename_into(incoming, folder)
        sync_folder(folder.parent)


def _rename_into(incoming: Path, folder: Path) -> bool:
    try:
        incoming.rename(folder)
    except OSError as error:
        # rename(2) names either for a folder that is not empty.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


async def _receive(path: Path, digest: Digest, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
    hasher, received = hashlib.sha256(), 0
    try:
        async with asyncio.timeout(max(RECEIVE_S_MIN, size_bytes / BYTES_PER_S_MIN)):
            with path.open("xb") as stream:
                async for chunk in _prompt(chunks):
                    received += len(chunk)
                    if received > size_bytes:
                        break
                    hasher.update(chunk)
                    with disk_faults(path):
                        stream.write(chunk)
    except TimeoutError as error:
        message = f"{received} of {size_bytes} bytes came, too slowly"
        raise UnavailableError("source_stalled", message, "send it again over a faster way") from error
    if received != size_bytes or "sha256:" + hasher.hexdigest() != digest:
        message = f"what arrived is not {size_bytes} bytes of digest {digest}"
        raise InvalidSpecError("digest_mismatch", message, _RESEND, field="digest")


async def _prompt(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The chunks, each in time and each of at least a byte; raises TimeoutError or InvalidSpecError."""
    while True:
        async with asyncio.timeout(CHUNK_TIMEOUT_S):
            chunk = await anext(chunks, None)
        if chunk is None:
            return
        if not chunk:
            raise InvalidSpecError("chunk_empty", "a chunk has no bytes", _RESEND, field="chunk")
        yield chunk


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Waits for `work` also when cancelled: a thread cannot be, and what it works on must stay until it is done."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.shield(working)
    finally:
        await asyncio.wait([working])


async def _build_disk(incoming: Path) -> None:
    tree = incoming / "tree"
    tree.mkdir()
    await unpack_apart(incoming / "source.tar", tree)
    disk = incoming / "disk.erofs"
    owner = (f"--force-uid={AGENT_ID}", f"--force-gid={AGENT_ID}")
    await run_command(
        "source_failed", "mkfs.erofs", "-zlz4", "-T0", "-U", EROFS_UUID, *owner, "-x-1", str(disk), str(tree)
    )
    await asyncio.to_thread(shutil.rmtree, tree)
    disk.chmod(0o644)
    (incoming / "source.tar").chmod(0o600)
    (incoming / "disk.digest").write_text(await asyncio.to_thread(_digest_file, disk))


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _corrupt(disk: Path, message: str) -> HostFaultError:
    return HostFaultError("source_corrupt", f"{disk}: {message}; it was thrown away", _RESEND)


def _digest_file(path: Path) -> str:
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
