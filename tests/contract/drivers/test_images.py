"""No VM boots from an image of which a byte is not what its manifest says, nor the manifest from what its digest says."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fleet.errors import HostFaultError
from fleet.model.host import UNTAGGED, HostImage
from fleet.model.ids import Digest
from hostd.drivers.image import ImageStore

FILES = {"kernel": "vmlinuz", "initramfs": "initramfs.img", "root": "root.erofs"}


def digest_of(content: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(content).hexdigest())


def manifest_of(**changes: Any) -> dict[str, Any]:
    files = {role: {"path": name, "digest": digest_of(role.encode())} for role, name in FILES.items()}
    return {"version": 1, "link_version": 2, "cmdline": "quiet", "files": files, **changes}


def put_image(images_dir: Path, manifest: Any, tag: str = "base:latest") -> tuple[Path, Digest]:
    """Lays an image out as provisioning does; its files hold their role's name."""
    content = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    digest = digest_of(content)
    folder = images_dir / digest.replace(":", "-")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(content)
    for role, name in FILES.items():
        (folder / name).write_text(role)
    (images_dir / "tags").mkdir(exist_ok=True)
    (images_dir / "tags" / tag).write_text(digest + "\n")
    return folder, digest


async def fault_of(store: ImageStore, digest: Digest) -> HostFaultError:
    with pytest.raises(HostFaultError) as caught:
        await store.ensure_image(digest)
    assert caught.value.next_step
    return caught.value


async def test_a_whole_image_boots(tmp_path: Path) -> None:
    """The files come as absolute paths, with the command line, and the tag is offered."""
    folder, digest = put_image(tmp_path, manifest_of())
    store = ImageStore(tmp_path)
    boot = await store.ensure_image(digest)
    assert (boot.kernel, boot.root, boot.cmdline) == (str(folder / "vmlinuz"), str(folder / "root.erofs"), "quiet")
    assert await store.list_images() == (HostImage("base:latest", digest),)


@pytest.mark.parametrize("name", [*FILES.values(), "manifest.json"])
@pytest.mark.parametrize("is_known", [False, True], ids=["fresh", "verified before"])
async def test_a_flipped_byte_is_found(tmp_path: Path, name: str, is_known: bool) -> None:
    """In every file, also in one that was whole a moment ago, with its time set back: the error names the file."""
    folder, digest = put_image(tmp_path, manifest_of())
    store = ImageStore(tmp_path)
    if is_known:
        await store.ensure_image(digest)
    path = folder / name
    before, content = path.stat(), bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    fault = await fault_of(store, digest)
    assert fault.code == "image_corrupt"
    assert str(path) in fault.message
    assert await store.list_images() == ()


@pytest.mark.parametrize("name", FILES.values())
async def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """An image without one of its files is corrupt, not missing."""
    folder, digest = put_image(tmp_path, manifest_of())
    (folder / name).unlink()
    fault = await fault_of(ImageStore(tmp_path), digest)
    assert (fault.code, str(folder / name) in fault.message) == ("image_corrupt", True)


async def test_a_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """A file elsewhere can change without a trace in the image's folder, so it is none of the image's."""
    folder, digest = put_image(tmp_path, manifest_of())
    (folder / "vmlinuz").rename(tmp_path / "elsewhere")
    (folder / "vmlinuz").symlink_to(tmp_path / "elsewhere")
    assert (await fault_of(ImageStore(tmp_path), digest)).code == "image_corrupt"


async def test_a_healed_image_is_taken_again(tmp_path: Path) -> None:
    """A refusal is not remembered longer than its cause."""
    folder, digest = put_image(tmp_path, manifest_of())
    store = ImageStore(tmp_path)
    (folder / "vmlinuz").write_text("broken")
    await fault_of(store, digest)
    (folder / "vmlinuz").write_text("kernel")
    await store.ensure_image(digest)


@pytest.mark.parametrize("digest", ["sha256:" + "0" * 64, "", "sha256:../../etc", "../x"])
async def test_what_is_not_there_is_missing(tmp_path: Path, digest: str) -> None:
    """An unknown digest, and what is none, name no folder."""
    assert (await fault_of(ImageStore(tmp_path), Digest(digest))).code == "image_missing"


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        {},
        manifest_of(files={}),
        manifest_of(files=[1]),
        manifest_of(files={role: {"path": "../" + name, "digest": ""} for role, name in FILES.items()}),
        manifest_of(files={role: {"path": "/etc/passwd", "digest": ""} for role in FILES}),
        manifest_of(files={role: {"path": name} for role, name in FILES.items()}),
    ],
    ids=["empty", "cut", "list", "noise", "deep", "bare", "no files", "odd", "climbing", "absolute", "no digests"],
)
async def test_an_odd_manifest_is_corrupt(tmp_path: Path, manifest: Any) -> None:
    """A manifest with the right digest and the wrong content ends as one error; hostd goes on."""
    _, digest = put_image(tmp_path, manifest)
    store = ImageStore(tmp_path)
    assert (await fault_of(store, digest)).code == "image_corrupt"
    assert await store.list_images() == ()


@pytest.mark.parametrize("version", [0, 1, "2", None])
async def test_another_link_is_unsupported(tmp_path: Path, version: Any) -> None:
    """An image of another release is told apart from a broken one."""
    _, digest = put_image(tmp_path, manifest_of(link_version=version))
    assert (await fault_of(ImageStore(tmp_path), digest)).code == "image_unsupported"


async def test_odd_tags_are_left_out(tmp_path: Path) -> None:
    """Folders, noise and half-written tags beside a good one cost nothing."""
    _, digest = put_image(tmp_path, manifest_of())
    tags = tmp_path / "tags"
    (tags / "folder:latest").mkdir()
    (tags / "noise:latest").write_bytes(os.urandom(64))
    (tags / "long:latest").write_text(digest + "0" * 100)
    (tags / ".half").write_text(digest)
    assert await ImageStore(tmp_path).list_images() == (HostImage("base:latest", digest),)


async def test_an_image_without_a_tag_is_listed_for_those_who_need_it(tmp_path: Path) -> None:
    """A tag that moved on takes no stopped sandbox's image away; nobody can ask for it by a name."""
    _, old = put_image(tmp_path, manifest_of())
    (tmp_path / "tags" / "base:latest").unlink()
    store = ImageStore(tmp_path)
    assert await store.list_images() == ()
    assert await store.list_images({old}) == (HostImage(UNTAGGED, old),)
    assert await store.list_images({old, Digest("sha256:" + "0" * 64)}) == (HostImage(UNTAGGED, old),)


async def test_no_folder_is_no_image(tmp_path: Path) -> None:
    """A host without any image says so with an empty list."""
    assert await ImageStore(tmp_path / "none").list_images() == ()


async def test_the_use_of_an_image_is_noted_and_its_listing_is_not(tmp_path: Path) -> None:
    """Garbage collection goes by when a VM last started from an image; that a host offers it is no use."""
    _, digest = put_image(tmp_path, manifest_of())
    store, note = ImageStore(tmp_path), tmp_path / "used" / digest.removeprefix("sha256:")
    await store.list_images()
    assert not note.exists()
    await store.ensure_image(digest)
    os.utime(note, (1, 1))
    await store.ensure_image(digest)
    assert note.stat().st_mtime > 1


async def test_an_image_boots_whose_use_cannot_be_noted(tmp_path: Path) -> None:
    """A store on a full or read-only disk costs its notes and no sandbox."""
    _, digest = put_image(tmp_path, manifest_of())
    (tmp_path / "used").write_text("in the way")
    assert (await ImageStore(tmp_path).ensure_image(digest)).digest == digest
