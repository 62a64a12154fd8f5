"""Packing: the same tree is the same bytes, all of it goes in or is refused by name, and .bedplateignore does what it says."""

import hashlib
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from fleet.errors import InvalidSpecError
from mb.ignore import parse_ignored
from mb.pack import pack_folder


def tar_of(folder: Path) -> bytes:
    stream = io.BytesIO()
    packed = pack_folder(folder, stream)
    content = stream.getvalue()
    assert packed.digest == "sha256:" + hashlib.sha256(content).hexdigest()
    assert packed.size_bytes == len(content)
    assert packed == pack_folder(folder)
    return content


def members_of(content: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        return tar.getmembers()


def test_times_owners_and_order_of_making_do_not_matter(tmp_path: Path) -> None:
    """A source is sent once, whoever checked it out and when."""
    for folder, names in (("one", ("b", "a")), ("two", ("a", "b"))):
        (tmp_path / folder / "sub").mkdir(parents=True)
        for name in names:
            (tmp_path / folder / "sub" / name).write_text(name)
        os.utime(tmp_path / folder / "sub" / "a", (1, len(folder) * 1000))
    (tmp_path / "two" / "sub").chmod(0o700)
    (tmp_path / "two" / "sub" / "a").chmod(0o600)
    assert tar_of(tmp_path / "one") == tar_of(tmp_path / "two")


def test_members_are_canonical(tmp_path: Path) -> None:
    """Sorted, folders first, owner and time zero, two modes, symlinks as they are, .git included."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    (tmp_path / "run").write_text("#!")
    (tmp_path / "run").chmod(0o4711)
    (tmp_path / "link").symlink_to("../outside")
    found = [(one.name, one.mode, one.type, one.linkname) for one in members_of(tar_of(tmp_path))]
    assert found == [
        (".git", 0o755, tarfile.DIRTYPE, ""),
        (".git/HEAD", 0o644, tarfile.REGTYPE, ""),
        ("link", 0o777, tarfile.SYMTYPE, "../outside"),
        ("run", 0o755, tarfile.REGTYPE, ""),
    ]
    assert all((one.uid, one.gid, one.mtime, one.uname) == (0, 0, 0, "") for one in members_of(tar_of(tmp_path)))


def test_an_empty_folder_is_a_source(tmp_path: Path) -> None:
    """Starting from nothing is allowed."""
    assert members_of(tar_of(tmp_path)) == []


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    """A socket cannot travel; leaving it out silently would change the tree."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "sock"))
        with pytest.raises(InvalidSpecError, match="sock is no file"):
            pack_folder(tmp_path)


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """Hosts and guests name paths in UTF-8."""
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).touch()
    with pytest.raises(InvalidSpecError, match="UTF-8"):
        pack_folder(tmp_path)


def test_a_tree_too_deep_is_refused(tmp_path: Path) -> None:
    """What a host would not unpack is not sent."""
    deep = tmp_path.joinpath(*["d"] * 65)
    deep.mkdir(parents=True)
    with pytest.raises(InvalidSpecError, match="64 folders deep"):
        pack_folder(tmp_path)


@pytest.mark.parametrize("name", ["absent", "file", "nul\0"])
def test_only_a_folder_is_packed(tmp_path: Path, name: str) -> None:
    """A path that is no folder is told as such."""
    (tmp_path / "file").touch()
    with pytest.raises(InvalidSpecError, match="is no folder"):
        pack_folder(tmp_path / name)


def test_ignored_paths_stay_behind(tmp_path: Path) -> None:
    """With all that is in them; the list itself goes along."""
    (tmp_path / ".bedplateignore").write_text("# big\nbuild/\n*.log\n")
    (tmp_path / "build" / "deep").mkdir(parents=True)
    (tmp_path / "build" / "deep" / "x").touch()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.log").touch()
    (tmp_path / "src" / "build").touch()
    assert [one.name for one in members_of(tar_of(tmp_path))] == [".bedplateignore", "src", "src/build"]


@pytest.mark.parametrize(
    ("pattern", "path", "is_folder", "is_ignored"),
    [
        ("name", "name", False, True),
        ("name", "a/b/name", False, True),
        ("name", "names", False, False),
        ("name/", "a/name", False, False),
        ("name/", "a/name", True, True),
        ("/name", "name", False, True),
        ("/name", "a/name", False, False),
        ("a/name", "a/name", False, True),
        ("a/name", "b/a/name", False, False),
        ("*.pyc", "a/b.pyc", False, True),
        ("*.pyc", "a/pyc", False, False),
        ("a/*/c", "a/b/c", False, True),
        ("a/*/c", "a/b/b/c", False, False),
        ("a/**/c", "a/c", False, True),
        ("a/**/c", "a/b/b/c", False, True),
        ("a/**", "a/b/b", False, True),
        ("a/**", "a", True, False),
        ("**/c", "a/b/c", False, True),
        ("?", "a", False, True),
        ("?", "ab", False, False),
        ("[ab]", "a", False, False),
        ("[ab]", "[ab]", False, True),
        ("a.b", "axb", False, False),
    ],
)
def test_a_pattern_means_what_the_page_says(pattern: str, path: str, is_folder: bool, is_ignored: bool) -> None:
    """The small language of .bedplateignore."""
    assert parse_ignored(pattern, "test")(path, is_folder) is is_ignored


@pytest.mark.parametrize("text", ["!keep", "a\n" * 501])
def test_what_cannot_be_done_is_refused(text: str) -> None:
    """Taking back is not supported, and is not taken for a name."""
    with pytest.raises(InvalidSpecError) as refused:
        parse_ignored(text, "test")
    assert refused.value.code == "ignore_invalid"
