"""The change of a source, on overlay trees made by hand: exact, sorted, bounded, and the same artifact for the same change."""

import hashlib
import io
import json
import os
import socket
import stat
import tarfile
from pathlib import Path

import pytest

from guestd.artifact import pack_artifact
from guestd.changes import DEPTH_MAX, find_changes
from guestd.configuration import Source
from guestd.fault import GuestFault
from hostd.drivers.simulated_guest import pack_nothing
from mb.artifact import read_artifact


class Trees:
    """A source and an upper tree, where guestd.workspace has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lower, self.upper = folder / "0/lower", folder / "0/upper"
        self.lower.mkdir(parents=True)
        self.upper.mkdir()

    def found(self, limit: int = 1000) -> list[tuple[str, str]]:
        return [(change.path, change.kind) for change in find_changes(str(self.lower), str(self.upper), limit)]

    def skipped(self) -> list[str]:
        return [
            str(change.describe()["path"])
            for change in find_changes(str(self.lower), str(self.upper))
            if change.is_skipped
        ]

    def pack(self, target: Path) -> dict[str, object]:
        source = Source({"serial": "source-0", "guest_path": "/w", "readonly": False, "digest": "sha256:0"})
        return pack_artifact([source], str(self.folder), str(target))


def write(path: Path, content: str = "", mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, 0)


def make_opaque(path: Path) -> None:
    os.setxattr(path, "trusted.overlay.opaque", b"y")


@pytest.fixture
def trees(tmp_path: Path) -> Trees:
    """An empty source that nobody has changed."""
    return Trees(tmp_path)


def test_nothing_changed_is_nothing(trees: Trees) -> None:
    """A file copied up by a touch, or written again as it was, is no change; neither is the folder it is in."""
    write(trees.lower / "d/same", "same")
    write(trees.upper / "d/same", "same")
    os.utime(trees.upper / "d/same", (1, 1))
    assert trees.found() == []


@pytest.mark.parametrize(
    ("before", "after"),
    [(("one", 0o644), ("two", 0o644)), (("one", 0o644), ("longer", 0o644)), (("one", 0o644), ("one", 0o755))],
)
def test_content_and_mode_are_changes(trees: Trees, before: tuple[str, int], after: tuple[str, int]) -> None:
    """Other bytes, another length, another mode: modified."""
    write(trees.lower / "f", *before)
    write(trees.upper / "f", *after)
    assert trees.found() == [("f", "modified")]


def test_a_new_tree_is_every_path_of_it(trees: Trees) -> None:
    """Folders too, in order."""
    write(trees.upper / "b/c/d")
    write(trees.upper / "b-side")
    assert trees.found() == [("b", "added"), ("b-side", "added"), ("b/c", "added"), ("b/c/d", "added")]


def test_symlinks_are_compared_by_target(trees: Trees) -> None:
    """A link that points elsewhere is modified, one made again as it was is not; none is followed."""
    for tree, target in ((trees.lower, "old"), (trees.upper, "new")):
        (tree / "moved").symlink_to(target)
        (tree / "same").symlink_to("/etc")
    assert trees.found() == [("moved", "modified")]


def test_a_folder_in_the_place_of_a_symlink_is_new_inside(trees: Trees, tmp_path: Path) -> None:
    """The source's symlink is never followed: what lies where it points is no part of the source."""
    write(tmp_path / "elsewhere/f", "same")
    (trees.lower / "d").symlink_to(tmp_path / "elsewhere")
    write(trees.upper / "d/f", "same")
    assert trees.found() == [("d", "modified"), ("d/f", "added")]


def test_a_file_in_the_place_of_a_folder_deletes_what_was_in_it(trees: Trees) -> None:
    """The folder's path is modified, everything below it deleted."""
    write(trees.lower / "d/e/f")
    write(trees.upper / "d")
    assert trees.found() == [("d", "modified"), ("d/e", "deleted"), ("d/e/f", "deleted")]


@pytest.mark.root
def test_a_whiteout_deletes_a_tree_path_by_path(trees: Trees) -> None:
    """Every path of a deleted folder is listed; a whiteout over nothing is nothing."""
    write(trees.lower / "d/e/f")
    whiteout(trees.upper / "d")
    whiteout(trees.upper / "never-was")
    assert trees.found() == [("d", "deleted"), ("d/e", "deleted"), ("d/e/f", "deleted")]


@pytest.mark.root
def test_an_opaque_folder_hides_the_source(trees: Trees) -> None:
    """A folder that was deleted and made again has lost what is not in it now, and only that."""
    write(trees.lower / "d/gone/deep")
    write(trees.lower / "d/stays", "s")
    write(trees.lower / "d/changed", "1")
    write(trees.upper / "d/stays", "s")
    write(trees.upper / "d/changed", "2")
    write(trees.upper / "d/new")
    make_opaque(trees.upper / "d")
    assert trees.found() == [
        ("d/changed", "modified"),
        ("d/gone", "deleted"),
        ("d/gone/deep", "deleted"),
        ("d/new", "added"),
    ]


@pytest.mark.root
def test_a_device_is_listed_and_left_behind(trees: Trees) -> None:
    """A character device that is no whiteout is no deletion."""
    write(trees.lower / "null")
    os.mknod(trees.upper / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert trees.found() == [("null", "modified")]
    assert trees.skipped() == ["null"]


def test_what_no_tar_should_carry_is_skipped(trees: Trees) -> None:
    """FIFOs, sockets, and names or targets that are no UTF-8 are listed as skipped."""
    os.mkfifo(trees.upper / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(trees.upper / "socket"))
    Path(os.fsdecode(os.fsencode(trees.upper) + b"/\xff")).write_text("x")
    (trees.upper / "link").symlink_to(os.fsdecode(b"\xfe"))
    assert trees.skipped() == ["fifo", "link", "socket", "\\xff"]


def test_too_many_changes_are_refused(trees: Trees) -> None:
    """Past the limit nothing is packed, and the fault says so."""
    for name in "abc":
        write(trees.upper / name)
    assert len(trees.found(limit=3)) == 3
    with pytest.raises(GuestFault) as caught:
        trees.found(limit=2)
    assert caught.value.code == "artifact_too_large"


def test_a_path_that_receivers_refuse_is_refused_here(trees: Trees) -> None:
    """Deeper than a receiver reads is a fault with a name, not an artifact that nobody can open."""
    (trees.upper / "/".join("d" * DEPTH_MAX)).mkdir(parents=True)
    assert len(trees.found()) == DEPTH_MAX
    (trees.upper / "/".join("d" * (DEPTH_MAX + 1))).mkdir(parents=True)
    with pytest.raises(GuestFault) as caught:
        trees.found()
    assert caught.value.code == "artifact_too_deep"


def test_an_artifact_is_deterministic_and_has_its_digest(trees: Trees, tmp_path: Path) -> None:
    """Packed twice it is the same bytes, as large and with the digest that is told; times and owners are not in it."""
    write(trees.lower / "f", "old")
    write(trees.upper / "f", "new", 0o755)
    (trees.upper / "l").symlink_to("f")
    first = trees.pack(tmp_path / "one")
    os.utime(trees.upper / "f", (1, 1))
    assert trees.pack(tmp_path / "two") == first
    content = (tmp_path / "two").read_bytes()
    assert content == (tmp_path / "one").read_bytes()
    assert first == {"size": len(content), "digest": "sha256:" + hashlib.sha256(content).hexdigest(), "changes": 2}
    (changes,) = read_artifact(io.BytesIO(content), len(content), ["/w"], [{}])
    assert [(change.path, change.new is not None) for change in changes] == [("f", True), ("l", True)]


def test_an_unchanged_sandbox_packs_as_the_simulated_guest_does(trees: Trees, tmp_path: Path) -> None:
    """The simulated guest's empty artifact is the real one's, byte for byte."""
    trees.pack(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == pack_nothing([{"guest_path": "/w", "digest": "sha256:0"}])


def test_a_file_past_the_limit_is_refused_before_it_is_read(trees: Trees, tmp_path: Path) -> None:
    """A sparse terabyte costs nothing and is told as too large."""
    with (trees.upper / "huge").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(GuestFault) as caught:
        trees.pack(tmp_path / "one")
    assert caught.value.code == "artifact_too_large"


def test_a_readonly_source_has_no_changes(tmp_path: Path) -> None:
    """It is listed, and no upper tree is looked for."""
    source = Source({"serial": "source-0", "guest_path": "/data", "readonly": True})
    assert pack_artifact([source], str(tmp_path), str(tmp_path / "tar"))["changes"] == 0
    with tarfile.open(tmp_path / "tar") as archive:
        listing = archive.extractfile("changes.json")
        assert listing is not None
        assert json.load(listing)["sources"] == [{"guest_path": "/data", "changes": []}]
