"""The image store: an image appears whole or not at all, and a damaged one is never called usable."""

import fcntl
from pathlib import Path

import pytest

from fleet.errors import HostFaultError, NotFoundError
from provisioning.imagestore import (
    STAGING_PREFIX,
    find_built,
    image_path,
    list_images,
    put_image,
    read_tag,
    sole_builder,
    staging_dir,
    write_key,
    write_tag,
)
from provisioning.manifest import FILE_ROLES, ImageFile, Manifest
from provisioning.verify import digest_file, verify_image, verify_sizes

KEY = "k" * 64


def _put(images_dir: Path, content: bytes = b"content") -> str:
    with staging_dir(images_dir) as staging:
        for role in FILE_ROLES:
            (staging / role).write_bytes(content + role.encode())
        files = {role: ImageFile(role, digest_file(staging / role), len(content) + len(role)) for role in FILE_ROLES}
        return put_image(images_dir, staging, Manifest("base", "x86_64", 1, "quiet", files, ()))


def test_a_put_image_is_whole_and_world_readable(tmp_path: Path) -> None:
    """hostd verifies what the builder wrote, and an unprivileged QEMU can open it."""
    digest = _put(tmp_path)
    assert verify_image(image_path(tmp_path, digest), digest).name == "base"
    assert {path.stat().st_mode & 0o777 for path in image_path(tmp_path, digest).iterdir()} == {0o644}
    assert not list(tmp_path.glob(f"{STAGING_PREFIX}*"))


def test_an_abandoned_build_leaves_nothing(tmp_path: Path) -> None:
    """An error in the middle of a build neither publishes an image nor keeps its parts."""
    with pytest.raises(FileNotFoundError), staging_dir(tmp_path) as staging:
        (staging / "root").write_bytes((tmp_path / "absent").read_bytes())
    assert list(tmp_path.iterdir()) == []


def test_putting_the_same_image_again_keeps_the_first(tmp_path: Path) -> None:
    """A running guest has the first one's files open; the second must not replace them."""
    digest = _put(tmp_path)
    inode = (image_path(tmp_path, digest) / "root").stat().st_ino
    assert _put(tmp_path) == digest
    assert (image_path(tmp_path, digest) / "root").stat().st_ino == inode


def test_a_damaged_image_is_replaced_by_the_next_put(tmp_path: Path) -> None:
    """Building again is the way out of a corrupt store."""
    digest = _put(tmp_path)
    (image_path(tmp_path, digest) / "root").write_bytes(b"damaged")
    assert _put(tmp_path) == digest
    verify_image(image_path(tmp_path, digest), digest)


def test_a_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    """Sizes alone do not prove an image: every byte is under its digest."""
    digest = _put(tmp_path)
    kernel = image_path(tmp_path, digest) / "kernel"
    kernel.write_bytes(kernel.read_bytes().replace(b"c", b"C", 1))
    verify_sizes(image_path(tmp_path, digest), digest)
    with pytest.raises(HostFaultError, match="kernel does not have the digest") as refused:
        verify_image(image_path(tmp_path, digest), digest)
    assert refused.value.code == "image_corrupt"


def test_an_image_under_a_false_name_is_refused(tmp_path: Path) -> None:
    """A whole image is not enough: it must be the one that was asked for."""
    first, second = _put(tmp_path), _put(tmp_path, b"other")
    with pytest.raises(HostFaultError, match="does not have the digest"):
        verify_image(image_path(tmp_path, first), second)


def test_a_symlink_is_no_file_of_an_image(tmp_path: Path) -> None:
    """A link could change under a digest that was checked a moment ago."""
    digest = _put(tmp_path)
    root = image_path(tmp_path, digest) / "root"
    root.rename(tmp_path / "elsewhere")
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostFaultError, match="no regular file"):
        verify_sizes(image_path(tmp_path, digest), digest)


def test_a_tag_moves_and_a_key_finds_only_what_is_there(tmp_path: Path) -> None:
    """Tags point at the newest image; a key whose image is damaged or gone leads to a new build."""
    first, second = _put(tmp_path), _put(tmp_path, b"other")
    write_tag(tmp_path, "base:latest", first)
    write_tag(tmp_path, "base:latest", second)
    write_key(tmp_path, KEY, first)
    assert (read_tag(tmp_path, "base:latest"), read_tag(tmp_path, "base:old")) == (second, None)
    assert find_built(tmp_path, KEY, full=True) == first
    (image_path(tmp_path, first) / "root").unlink()
    assert find_built(tmp_path, KEY, full=False) is None
    with pytest.raises(NotFoundError):
        verify_image(tmp_path / "absent")


def test_the_listing_says_what_is_wrong(tmp_path: Path) -> None:
    """A broken image is listed with its problem: an operator must see it to remove it."""
    whole, broken = _put(tmp_path), _put(tmp_path, b"other")
    write_tag(tmp_path, "base:latest", whole)
    (image_path(tmp_path, broken) / "root").unlink()
    listed = {image.digest: image for image in list_images(tmp_path)}
    assert (listed[whole].tags, listed[whole].problem) == (("base:latest",), "")
    assert "missing" in listed[broken].problem


def test_one_builder_works_in_a_folder_and_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    """Two builds never write the same cache, and a kill -9 costs no disk for good."""
    (tmp_path / f"{STAGING_PREFIX}dead").mkdir()
    with sole_builder(tmp_path, STAGING_PREFIX):
        assert not (tmp_path / f"{STAGING_PREFIX}dead").exists()
        with (tmp_path / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
