"""Artifacts are hostile: what an honest guest writes is read, everything else is refused as a whole."""

import io
import tarfile
from typing import Any

import pytest

from fleet.errors import InvalidSpecError
from mb.artifact import ChangeKind, read_artifact
from mb.tarread import NodeKind, read_nodes
from tests.unit.mb.build import Member, artifact_of, changes_of, tar_of

SOURCE = tar_of([Member("dir"), Member("dir/a", "old\n"), Member("gone", "x"), Member("run", "#!", mode=0o755)])
ADDED = {"path": "new", "kind": "added"}


def refuse(artifact: bytes) -> None:
    with pytest.raises(InvalidSpecError) as refused:
        changes_of(SOURCE, artifact)
    assert refused.value.code == "tar_invalid"


def test_changes_are_read_with_both_sides() -> None:
    """Each change knows what went in and what came out, sorted by path."""
    listed: list[dict[str, Any]] = [
        {"path": "new", "kind": "added"},
        {"path": "dir/a", "kind": "modified"},
        {"path": "gone", "kind": "deleted"},
        {"path": "sock", "kind": "added", "skipped": True},
    ]
    changes = changes_of(SOURCE, artifact_of(listed, [Member("0/new", link="dir"), Member("0/dir/a", "new\n")]))
    assert [(one.path, one.kind, one.is_skipped) for one in changes] == [
        ("dir/a", ChangeKind.MODIFIED, False),
        ("gone", ChangeKind.DELETED, False),
        ("new", ChangeKind.ADDED, False),
        ("sock", ChangeKind.ADDED, True),
    ]
    modified, deleted, added, _ = changes
    assert (modified.old is not None, modified.new is not None) == (True, True)
    assert deleted.old is not None
    assert deleted.new is None
    assert added.new is not None
    assert (added.new.kind, added.new.link) == (NodeKind.SYMLINK, "dir")


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../up", "a//b", "./a", "", "a/./b", "a\0b", "d/" * 90])
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    """Neither the list nor a member may name anything but a path below the source."""
    refuse(artifact_of([{"path": path, "kind": "deleted"}], []))
    if "\0" not in path and path:
        refuse(artifact_of([ADDED], [Member("0/new", "x"), Member(path + "/x", "x")]))


@pytest.mark.parametrize(
    ("listed", "members"),
    [
        ([ADDED], []),
        ([], [Member("0/new", "x")]),
        ([ADDED, ADDED], [Member("0/new", "x")]),
        ([ADDED], [Member("0/new", "x"), Member("0/new", "y")]),
        ([ADDED], [Member("1/new", "x")]),
        ([ADDED], [Member("new", "x")]),
        ([{"path": "gone", "kind": "deleted"}], [Member("0/gone", "x")]),
        ([{**ADDED, "skipped": True}], [Member("0/new", "x")]),
        ([{"path": "new", "kind": "moved"}], [Member("0/new", "x")]),
        ([{"path": 5}], []),
        (["new"], []),
        ([{"path": "\ud800", "kind": "deleted"}], []),
    ],
)
def test_list_and_members_must_agree(listed: list[Any], members: list[Member]) -> None:
    """A change without its content, or content that no change names, is a lie."""
    refuse(artifact_of(listed, members))


@pytest.mark.parametrize(
    "listing",
    [{"version": 2}, {"sources": []}, {"sources": {}}, {"sources": [{"guest_path": "/other", "changes": []}]}],
)
def test_a_list_of_other_sources_is_refused(listing: dict[str, Any]) -> None:
    """The artifact must be of the sources that the sandbox was given."""
    refuse(artifact_of([], [], **listing))


@pytest.mark.parametrize("first", [Member("0/new", "x"), Member("changes.json", link="x"), Member("changes.json", "[")])
def test_the_list_comes_first_and_is_json(first: Member) -> None:
    """Without its list an artifact says nothing."""
    refuse(tar_of([first]))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"V"])
def test_other_members_are_refused(kind: bytes) -> None:
    """No hard links, devices, fifos, sparse files or extensions."""
    member = tarfile.TarInfo("0/new")
    member.type, member.linkname = kind, "x"
    content = member.tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(InvalidSpecError):
        list(read_nodes(io.BytesIO(content + bytes(1024)), len(content) + 1024))


@pytest.mark.parametrize(
    "records",
    [b"12 path=\n", b"0 a=b\n", b"99999999 a=b\n", b"x", b"8 size=1\n", b"19 GNU.sparse.a=b1\n", b"9 path=\xff\n"],
)
def test_pax_records_are_bounded_and_checked(records: bytes) -> None:
    """A record that is damaged, or that would make readers disagree about sizes, ends the reading."""
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, len(records)
    blocks = extended.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")
    content = blocks + tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    with pytest.raises(InvalidSpecError):
        list(read_nodes(io.BytesIO(content), len(content)))


def test_a_large_pax_header_is_not_read() -> None:
    """A header may not claim the memory of the reader."""
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, 64 * 1024
    content = extended.tobuf(tarfile.USTAR_FORMAT) + bytes(65 * 1024)
    with pytest.raises(InvalidSpecError, match="too large"):
        list(read_nodes(io.BytesIO(content), len(content)))


@pytest.mark.parametrize("cut", [0, 100, 512, 1000, 1024])
def test_a_tar_that_is_cut_off_is_refused(cut: int) -> None:
    """An incomplete artifact is none."""
    content = artifact_of([ADDED], [Member("0/new", "x" * 600)])[:cut]
    with pytest.raises(InvalidSpecError, match="cut off"):
        read_artifact(io.BytesIO(content), len(content), ["/workspace"], [{}])


def test_long_names_are_read() -> None:
    """Paths past the old header's 100 characters travel in pax records."""
    name = "0/" + "ü" * 120 + "/" + "b" * 130
    (node,) = read_nodes(io.BytesIO(content := tar_of([Member(name, "x")])), len(content))
    assert node.path == name
