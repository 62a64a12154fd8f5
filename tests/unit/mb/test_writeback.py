"""Writing back: what was changed here is safe, nothing leaves the folder, and nothing is written before all is known."""

import io
from pathlib import Path
from typing import Any

import pytest

from mb.writeback import Action, Choices, Step, apply_writeback, look, plan_writeback
from tests.unit.mb.build import Member, artifact_of, changes_of, tar_of

SOURCE = tar_of([Member("dir"), Member("dir/a", "old\n"), Member("gone", "bye\n"), Member("link", link="dir")])
MODIFIED = {"path": "dir/a", "kind": "modified"}
DELETED = {"path": "gone", "kind": "deleted"}


def write_back(folder: Path, listed: list[dict[str, Any]], members: list[Member], **choices: bool) -> list[Step]:
    """Looks, plans and, without a conflict, applies."""
    artifact = artifact_of(listed, members)
    changes = changes_of(SOURCE, artifact)
    here = look(folder, changes, io.BytesIO(SOURCE), io.BytesIO(artifact))
    steps = plan_writeback(changes, here, Choices(**choices))
    if not any(step.action is Action.CONFLICT for step in steps):
        apply_writeback(folder, steps, io.BytesIO(artifact))
    return steps


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as it went into the sandbox."""
    home = tmp_path / "home"
    (home / "dir").mkdir(parents=True)
    (home / "dir" / "a").write_text("old\n")
    (home / "gone").write_text("bye\n")
    (home / "link").symlink_to("dir")
    return home


def test_an_unchanged_file_takes_the_new_content(folder: Path) -> None:
    """The ordinary way home needs no force, and doing it twice changes nothing."""
    members = [Member("0/dir/a", "new\n", mode=0o4755)]
    assert [step.action for step in write_back(folder, [MODIFIED], members)] == [Action.WRITE]
    assert (folder / "dir" / "a").read_text() == "new\n"
    assert (folder / "dir" / "a").stat().st_mode & 0o7777 & ~0o022 == 0o755
    assert [step.action for step in write_back(folder, [MODIFIED], members)] == [Action.NOTHING]
    assert names_in(folder / "dir") == ["a"]


def test_a_file_changed_here_is_a_conflict_until_forced(folder: Path) -> None:
    """Nobody's work is overwritten unasked, and a conflict anywhere means nothing is written at all."""
    (folder / "gone").write_text("mine\n")
    listed = [MODIFIED, {"path": "gone", "kind": "modified"}]
    members = [Member("0/dir/a", "new\n"), Member("0/gone", "theirs\n")]
    assert Action.CONFLICT in [step.action for step in write_back(folder, listed, members)]
    assert (folder / "dir" / "a").read_text() == "old\n"
    write_back(folder, listed, members, force=True)
    assert (folder / "gone").read_text() == "theirs\n"


def test_deletions_are_done_only_when_asked(folder: Path) -> None:
    """Without --apply a deleted file stays; with it only the file that went in goes, and a folder only when empty."""
    listed = [DELETED, {"path": "dir/a", "kind": "deleted"}, {"path": "dir", "kind": "deleted"}]
    assert {step.action for step in write_back(folder, listed, [])} == {Action.LEAVE}
    (folder / "dir" / "mine").touch()
    write_back(folder, listed, [], delete=True)
    assert names_in(folder) == ["dir", "link"]
    assert names_in(folder / "dir") == ["mine"]
    (folder / "dir" / "mine").unlink()
    write_back(folder, listed, [], delete=True)
    assert names_in(folder) == ["link"]


def test_a_file_changed_here_is_not_deleted(folder: Path) -> None:
    """Deleting is overwriting too."""
    (folder / "gone").write_text("mine\n")
    assert [step.action for step in write_back(folder, [DELETED], [], delete=True)] == [Action.CONFLICT]
    assert (folder / "gone").exists()
    write_back(folder, [DELETED], [], delete=True, force=True)
    assert not (folder / "gone").exists()


def test_nothing_is_written_through_a_symlink(folder: Path, tmp_path: Path) -> None:
    """Neither through one that is here nor, in the artifact, through one that it brings."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "way").symlink_to(outside)
    listed: list[dict[str, Any]] = [{"path": "way/x", "kind": "added"}]
    steps = write_back(folder, listed, [Member("0/way/x", "x")], force=True)
    assert [step.action for step in steps] == [Action.CONFLICT]
    assert names_in(outside) == []


def test_symlinks_that_stay_inside_do_not_leave_together(folder: Path) -> None:
    """`dir/up` is the folder itself, so `dir/up/..` is above it, whatever the text of the path looks like."""
    listed = [{"path": path, "kind": "added"} for path in ("dir/up", "out")]
    members = [Member("0/dir/up", link=".."), Member("0/out", link="dir/up/../secret")]
    (folder.parent / "secret").write_text("not yours")
    steps = write_back(folder, listed, members)
    assert [step.action for step in steps] == [Action.WRITE, Action.LEAVE]
    assert not (folder / "out").exists()


@pytest.mark.parametrize("target", ["/etc", "../outside", "dir/../../outside", ".."])
def test_a_symlink_that_leads_outside_is_left(folder: Path, target: str) -> None:
    """An editor that follows it would write where the sandbox wants; one that stays inside is made."""
    listed: list[dict[str, Any]] = [{"path": "out", "kind": "added"}, {"path": "dir/in", "kind": "added"}]
    members = [Member("0/out", link=target), Member("0/dir/in", link="../gone")]
    steps = write_back(folder, listed, members)
    assert {step.change.path: step.action for step in steps} == {"out": Action.LEAVE, "dir/in": Action.WRITE}
    assert not (folder / "out").is_symlink()
    assert (folder / "dir" / "in").readlink() == Path("../gone")


def test_a_file_that_became_a_symlink_is_replaced_not_followed(folder: Path) -> None:
    """The link takes the file's place; what it points to is untouched."""
    write_back(folder, [{"path": "gone", "kind": "modified"}], [Member("0/gone", link="dir/a")])
    assert (folder / "gone").readlink() == Path("dir/a")
    assert (folder / "dir" / "a").read_text() == "old\n"


def test_git_is_left_alone_unless_asked(folder: Path) -> None:
    """A hook that a sandbox wrote would run as the user at the next git command."""
    listed: list[dict[str, Any]] = [{"path": ".git/hooks/post-checkout", "kind": "added"}]
    members = [Member("0/.git/hooks/post-checkout", "#!", mode=0o755)]
    assert [step.action for step in write_back(folder, listed, members)] == [Action.LEAVE]
    assert not (folder / ".git").exists()
    write_back(folder, listed, members, with_git=True)
    assert (folder / ".git" / "hooks" / "post-checkout").exists()


def test_a_folder_in_the_way_is_always_a_conflict(folder: Path) -> None:
    """Force overwrites files, never whole folders."""
    (folder / "new").mkdir()
    steps = write_back(folder, [{"path": "new", "kind": "added"}], [Member("0/new", "x")], force=True)
    assert [step.action for step in steps] == [Action.CONFLICT]


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    """By default changes go to a folder of their own, with all folders they need."""
    listed: list[dict[str, Any]] = [MODIFIED, DELETED, {"path": "empty", "kind": "added"}]
    write_back(tmp_path / "fresh" / "one", listed, [Member("0/dir/a", "new\n"), Member("0/empty")], delete=True)
    assert (tmp_path / "fresh" / "one" / "dir" / "a").read_text() == "new\n"
    assert (tmp_path / "fresh" / "one" / "empty").is_dir()
