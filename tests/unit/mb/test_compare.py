"""Differences: git's form, honest about what has no lines."""

import io
from typing import Any

import pytest

from mb.compare import FileDiff, compare, is_git_path, quote_path
from tests.unit.mb.build import Member, artifact_of, changes_of, tar_of


def diff_of(source: list[Member], change: dict[str, Any], members: list[Member]) -> FileDiff:
    old, new = tar_of(source), artifact_of([change], members)
    (found,) = changes_of(old, new)
    return compare(found, io.BytesIO(old), io.BytesIO(new))


def test_a_changed_line_is_a_unified_diff() -> None:
    """Header, hunk, and both lines, with a mark where the end of the file has no newline."""
    old, new = Member("a.py", "one\ntwo\nthree\n"), Member("0/a.py", "one\n2\nthree", mode=0o755)
    diff = diff_of([old], {"path": "a.py", "kind": "modified"}, [new])
    assert diff.lines == (
        "diff --git a/a.py b/a.py",
        "old mode 100644",
        "new mode 100755",
        "--- a/a.py",
        "+++ b/a.py",
        "@@ -1,3 +1,3 @@",
        " one",
        "-two",
        "-three",
        "+2",
        "+three",
        "\\ No newline at end of file",
    )
    assert (diff.insertions, diff.deletions) == (2, 2)


def test_additions_and_deletions_name_dev_null() -> None:
    """A new file has no old side, a deleted one no new side; a symlink's text is its target."""
    added = diff_of([], {"path": "l", "kind": "added"}, [Member("0/l", link="target")])
    deleted = diff_of([Member("b", "x\n")], {"path": "b", "kind": "deleted"}, [])
    assert added.lines[1:4] == ("new file mode 120000", "--- /dev/null", "+++ b/l")
    assert added.lines[5:] == ("+target", "\\ No newline at end of file")
    assert deleted.lines[1:4] == ("deleted file mode 100644", "--- a/b", "+++ /dev/null")


def test_dashes_in_a_file_are_counted_as_lines() -> None:
    """Counting looks at the hunks, not at what resembles a header."""
    diff = diff_of([Member("a", "-- x\n")], {"path": "a", "kind": "modified"}, [Member("0/a", "++ y\n")])
    assert (diff.insertions, diff.deletions) == (1, 1)


@pytest.mark.parametrize("text", ["a\0b", "x" * 600_000, "\n" * 10_001])
def test_what_is_no_readable_text_is_named(text: str) -> None:
    """Binary, huge and endless files cost no comparison; they are told as different."""
    diff = diff_of([Member("a", "x")], {"path": "a", "kind": "modified"}, [Member("0/a", text)])
    assert diff.lines[-1] == "Binary files a/a and b/a differ"
    assert (diff.remark, diff.insertions) == ("binary or large", 0)


@pytest.mark.parametrize(
    ("source", "change", "members", "remark"),
    [
        ([], {"path": "d", "kind": "added"}, [Member("0/d")], "folder"),
        ([Member("d")], {"path": "d", "kind": "deleted"}, [], "folder"),
        ([], {"path": "s", "kind": "added", "skipped": True}, [], "socket, device or fifo: not carried"),
        ([Member("f", "x")], {"path": "f", "kind": "modified"}, [Member("0/f", "x", mode=0o600)], "permissions only"),
    ],
)
def test_changes_without_lines_say_why(
    source: list[Member], change: dict[str, Any], members: list[Member], remark: str
) -> None:
    """Nothing that changed is passed over in silence."""
    diff = diff_of(source, change, members)
    assert (diff.remark, diff.lines) == (remark, ())


@pytest.mark.parametrize(
    ("path", "quoted"),
    [("a b", "a b"), ("ü", "ü"), ('a"b', '"a\\042b"'), ("a\nb", '"a\\012b"'), ("a\u202eb", '"a\\342\\200\\256b"')],
)
def test_paths_are_quoted_as_git_does(path: str, quoted: str) -> None:
    """A path with a newline cannot forge a line of the diff."""
    assert quote_path(path) == quoted


@pytest.mark.parametrize(
    ("path", "is_git"),
    [(".git/config", True), ("a/.GIT/hooks/x", True), (".git", True), (".gitignore", False), ("git/x", False)],
)
def test_what_git_would_run_is_known(path: str, is_git: bool) -> None:
    """A sandbox that writes .git/hooks writes programs that git runs here."""
    assert is_git_path(path) is is_git
