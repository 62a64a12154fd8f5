"""A source is complete, verified and durable, or it is not there; nobody sees another tenant's."""

import asyncio
import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fleet.errors import HostFaultError, InvalidSpecError, NotFoundError
from fleet.model.admission import SOURCE_BYTES_MAX
from fleet.model.ids import Digest, Tenant, digest_hex
from fleet.model.units import MIB
from hostd.drivers.image import SourceStore
from hostd.drivers.image.unpack import Bounds, unpack_apart

ACME, OTHER = Tenant("acme"), Tenant("other")


def pack(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def digest_of(content: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(content).hexdigest())


TAR = pack(README=b"hello\n", run=b"#!/bin/sh\n")
DIGEST = digest_of(TAR)


async def chunks(content: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def put(store: SourceStore, content: bytes = TAR, *, tenant: Tenant = ACME) -> None:
    await store.put(tenant, digest_of(content), len(content), chunks(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sources"


@pytest.fixture
def store(folder: Path) -> SourceStore:
    """A store without sources."""
    return SourceStore(folder)


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


@pytest.mark.parametrize(
    ("digest", "size_bytes", "content"),
    [
        (digest_of(b"other"), len(TAR), TAR),
        (DIGEST, len(TAR) - 1, TAR),
        (DIGEST, len(TAR) + 1, TAR),
        (DIGEST, len(TAR), TAR[:-1]),
        (DIGEST, len(TAR), TAR + b"\0"),
        (DIGEST, len(TAR), b""),
    ],
    ids=["digest", "too many", "too few", "cut", "longer", "nothing"],
)
async def test_what_arrives_is_what_was_told(
    store: SourceStore, folder: Path, digest: Digest, size_bytes: int, content: bytes
) -> None:
    """One byte or one digit off is refused, and leaves nothing on the disk."""
    with pytest.raises(InvalidSpecError) as caught:
        await store.put(ACME, digest, size_bytes, chunks(content))
    assert caught.value.code == "digest_mismatch"
    assert not store.has(ACME, digest)
    assert is_empty(folder)


async def test_a_sender_without_end_is_cut(store: SourceStore, folder: Path) -> None:
    """No more is read than was announced."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield bytes(1000)

    with pytest.raises(InvalidSpecError):
        await store.put(ACME, DIGEST, 10_000, endless())
    assert sent <= 11_000
    assert is_empty(folder)


async def test_a_source_past_the_limit_is_not_read(store: SourceStore) -> None:
    """The announced size alone refuses it."""

    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    with pytest.raises(InvalidSpecError) as caught:
        await store.put(ACME, DIGEST, SOURCE_BYTES_MAX + 1, unread())
    assert (caught.value.code, caught.value.field) == ("source_too_large", "size_bytes")


async def test_a_sender_that_breaks_off_leaves_nothing(store: SourceStore, folder: Path) -> None:
    """An upload that ends in an error has not happened."""

    async def broken() -> AsyncIterator[bytes]:
        yield TAR[:100]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await store.put(ACME, DIGEST, len(TAR), broken())
    assert is_empty(folder)


@pytest.mark.parametrize("content", [b"no tar", pack(**{"../x": b""})], ids=["noise", "climbing"])
async def test_what_is_no_clean_tar_is_refused(store: SourceStore, folder: Path, content: bytes) -> None:
    """The right digest does not make a hostile tar welcome."""
    with pytest.raises(InvalidSpecError) as caught:
        await put(store, content)
    assert caught.value.code == "source_invalid"
    assert is_empty(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "bounds", [Bounds(cpu_s=1), Bounds(memory_bytes=48 * MIB), Bounds(timeout_s=0.5)], ids=["cpu", "memory", "time"]
)
async def test_a_costly_tar_costs_its_sender_only(tmp_path: Path, bounds: Bounds) -> None:
    """What takes more CPU, memory or time than unpacking may have is ended from outside and refused by name."""
    tar, tree = tmp_path / "source.tar", tmp_path / "tree"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as packed:
        for number in range(100_000):
            # The paths of folders are remembered.
            member = tarfile.TarInfo(f"{number:099}")
            member.type = tarfile.DIRTYPE
            packed.addfile(member)
    tree.mkdir()
    with pytest.raises(InvalidSpecError) as caught:
        await unpack_apart(tar, tree, bounds)
    assert (caught.value.code, "within" in caught.value.message) == ("source_invalid", True)


@pytest.mark.root
async def test_a_tar_is_unpacked_without_privileges(tmp_path: Path) -> None:
    """Root's hostd lets nobody's process read a stranger's tar: what comes out belongs to nobody."""
    tar, tree = tmp_path / "source.tar", tmp_path / "tree"
    tar.write_bytes(TAR)
    tar.chmod(0o600)
    tree.mkdir(mode=0o700)
    await unpack_apart(tar, tree)
    assert {path.name: path.stat().st_uid for path in tree.iterdir()} == {"README": 65534, "run": 65534}


async def test_an_empty_chunk_is_refused(store: SourceStore, folder: Path) -> None:
    """A sender of chunks without bytes would never end."""

    async def nothing() -> AsyncIterator[bytes]:
        while True:
            yield b""

    with pytest.raises(InvalidSpecError) as caught:
        await store.put(ACME, DIGEST, len(TAR), nothing())
    assert caught.value.code == "chunk_empty"
    assert is_empty(folder)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of a GiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1G", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
async def test_uploads_under_way_count_against_the_disk(small: Path) -> None:
    """Two uploads that fit one by one and not together: the second is refused while the first is under way, and heard after it."""
    store, size_bytes = SourceStore(small), 100 * MIB
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def held_up() -> AsyncIterator[bytes]:
        begun.set()
        await go_on.wait()
        yield TAR

    first = asyncio.create_task(store.put(ACME, DIGEST, size_bytes, held_up()))
    await begun.wait()
    with pytest.raises(HostFaultError) as caught:
        await store.put(OTHER, DIGEST, size_bytes, chunks(TAR))
    assert caught.value.code == "disk_full"
    go_on.set()
    with pytest.raises(InvalidSpecError):
        await first
    with pytest.raises(InvalidSpecError) as heard:
        await store.put(OTHER, DIGEST, size_bytes, chunks(TAR))
    assert heard.value.code == "digest_mismatch"


async def test_an_unknown_source_is_not_found(store: SourceStore) -> None:
    """Neither its tar nor its disk."""
    with pytest.raises(NotFoundError):
        store.tar_path(ACME, DIGEST)
    with pytest.raises(NotFoundError):
        await store.ensure_disk(ACME, DIGEST)


def test_an_upload_under_way_is_no_source(folder: Path) -> None:
    """The names inside a tree that is being unpacked are the sender's, and none of them becomes a tenant or a digest."""
    store = SourceStore(folder)
    for path in (".incoming-x/tree", "acme/short", f"UPPER/{digest_hex(DIGEST)}"):
        (folder / path).mkdir(parents=True)
        (folder / path / "disk.digest").touch()
    assert store.list_sources() == []


def test_a_start_clears_what_a_crash_left(folder: Path) -> None:
    """An upload that a kill -9 cut short takes no disk for good."""
    (folder / ".incoming-x/tree").mkdir(parents=True)
    SourceStore(folder)
    assert is_empty(folder)


@pytest.mark.root
async def test_a_source_becomes_a_disk(store: SourceStore, tmp_path: Path) -> None:
    """Every file is on the disk, owned by the guest's agent, and the tar comes back as it was sent."""
    await put(store)
    assert store.tar_path(ACME, DIGEST).read_bytes() == TAR
    disk = await store.ensure_disk(ACME, DIGEST)
    unpacked = tmp_path / "unpacked"
    subprocess.run(["fsck.erofs", f"--extract={unpacked}", disk], check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in unpacked.iterdir()} == {
        "README": b"hello\n",
        "run": b"#!/bin/sh\n",
    }
    assert {path.stat().st_uid for path in unpacked.iterdir()} == {1001}


@pytest.mark.root
async def test_the_same_source_is_the_same_disk(store: SourceStore) -> None:
    """Two hosts, or two tenants, make the same bytes of it."""
    disks = []
    for tenant in (ACME, OTHER):
        await put(store, tenant=tenant)
        disks.append(Path(await store.ensure_disk(tenant, DIGEST)).read_bytes())
    assert disks[0] == disks[1]


@pytest.mark.root
async def test_tenants_do_not_see_each_other(store: SourceStore) -> None:
    """What one tenant has, another has not, until it has sent the bytes itself."""
    await put(store)
    assert store.has(ACME, DIGEST)
    assert not store.has(OTHER, DIGEST)
    with pytest.raises(NotFoundError):
        store.tar_path(OTHER, DIGEST)
    with pytest.raises(InvalidSpecError):
        await store.put(OTHER, DIGEST, len(TAR), chunks(b"guess"))
    assert store.list_sources() == [(ACME, DIGEST)]


@pytest.mark.root
async def test_a_source_sent_twice_at_once_is_held_once(store: SourceStore) -> None:
    """Two uploads of the same bytes at the same time both succeed."""
    await asyncio.gather(put(store), put(store))
    assert store.list_sources() == [(ACME, DIGEST)]
    await store.ensure_disk(ACME, DIGEST)


@pytest.mark.root
async def test_a_restart_finds_its_sources(store: SourceStore, folder: Path) -> None:
    """What was taken in is held by the next hostd."""
    await put(store)
    again = SourceStore(folder)
    assert again.list_sources() == [(ACME, DIGEST)]
    await again.ensure_disk(ACME, DIGEST)


@pytest.mark.root
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
async def test_a_damaged_disk_is_refused(store: SourceStore, damage: str) -> None:
    """No VM starts from a source disk that is not what was made; the error names the file, and it can be sent again."""
    await put(store)
    disk = Path(await store.ensure_disk(ACME, DIGEST))
    content = bytearray(disk.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        disk.unlink()
    else:
        disk.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(HostFaultError) as caught:
        await store.ensure_disk(ACME, DIGEST)
    assert caught.value.code == "source_corrupt"
    assert str(disk) in caught.value.message
    assert "mb up" in caught.value.next_step
    assert not store.has(ACME, DIGEST)
    await put(store)
    assert await store.ensure_disk(ACME, DIGEST) == str(disk)


@pytest.mark.root
async def test_the_next_step_heals(store: SourceStore) -> None:
    """After the folder is removed, wholly or in part, the source can be sent again."""
    await put(store)
    disk = Path(await store.ensure_disk(ACME, DIGEST))
    (disk.parent / "disk.digest").unlink()
    await put(store)
    shutil.rmtree(disk.parent)
    await put(store)
    assert await store.ensure_disk(ACME, DIGEST) == str(disk)
