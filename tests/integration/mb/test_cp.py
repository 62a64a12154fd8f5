"""cp as a process of its own, against programs that really run: what goes in and comes out, and what a hostile guest sends."""

import os
from pathlib import Path

import pytest

from fleet.model.sandbox import Phase
from mb.exits import Exit
from tests.integration.mb.desk import Desk
from tests.integration.mb.parts import Mb
from tests.unit.mb.build import Member, sandbox, tar_of

NAME = "fix-tests"


@pytest.fixture(autouse=True)
def running(desk: Desk) -> None:
    """One sandbox runs."""
    desk.put(sandbox(phase=Phase.RUNNING))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with everything that a folder may have."""
    folder = tmp_path / "tree"
    (folder / "deep" / "empty").mkdir(parents=True)
    (folder / "a b").write_bytes(os.urandom(3_000_000))
    (folder / "-run").write_text("#!/bin/sh\n")
    (folder / "-run").chmod(0o755)
    (folder / "deep" / ("ü" * 60)).write_text("long")
    (folder / "link").symlink_to("deep")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    return folder


def content_of(folder: Path) -> dict[str, object]:
    """Every path with what it is."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        is_file = path.is_file() and not path.is_symlink()
        content = (path.read_bytes(), bool(path.stat().st_mode & 0o111)) if is_file else None
        found[str(path.relative_to(folder))] = str(path.readlink()) if path.is_symlink() else content
    return found


async def test_a_file_goes_in_and_comes_out(line: Mb, tmp_path: Path) -> None:
    """Under a new name, into a folder under its own, over what was there; bytes and x are kept."""
    source = tmp_path / "run me"
    source.write_bytes(os.urandom(1_000_001))
    source.chmod(0o755)
    guest, here = tmp_path / "guest", tmp_path / "here"
    guest.mkdir()
    here.mkdir()
    for target in (guest / "other", guest, f"{guest}/new/", guest / "other"):
        ended = await line.run("cp", source, f"{NAME}:{target}")
        assert ended.code == 0, ended.stderr
    assert {str(path.relative_to(guest)) for path in guest.rglob("*")} == {"other", "run me", "new", "new/run me"}
    for dest in (here, here / "renamed"):
        assert (await line.run("cp", f"{NAME}:{guest}/run me", dest)).code == 0
    for path in (here / "run me", here / "renamed"):
        assert path.read_bytes() == source.read_bytes()
        assert path.stat().st_mode & 0o111


async def test_a_folder_goes_in_and_comes_out(line: Mb, tree: Path, tmp_path: Path) -> None:
    """Names of every kind, empty folders, symlinks and x survive the way there and back; .git only when it is asked for."""
    guest, here = tmp_path / "guest", tmp_path / "here"
    assert (await line.run("cp", tree, f"{NAME}:{guest}")).code == 0
    assert content_of(guest) == content_of(tree)
    assert (await line.run("cp", tree, f"{NAME}:{guest}")).code == 0
    assert content_of(guest / "tree") == content_of(tree)
    ended = await line.run("cp", f"{NAME}:{guest}/tree", here)
    assert ended.code == 0, ended.stderr
    assert "2 paths: git would run what is in it" in " ".join(ended.stderr.split())
    expected = {path: what for path, what in content_of(tree).items() if not path.startswith(".git")}
    assert content_of(here) == expected
    (here / "a b").write_text("mine")
    assert (await line.run("cp", f"{NAME}:{guest}/tree/.", here, "--with-git")).code == 0
    assert content_of(here) == content_of(tree)


async def test_tars_go_through_pipes(line: Mb, tmp_path: Path) -> None:
    """`-` takes a tar in, and gives one out."""
    guest = tmp_path / "guest"
    content = tar_of([Member("one", "1"), Member("two/three", "3")])
    assert (await line.run("cp", "-", f"{NAME}:{guest}", stdin=content)).code == 0
    assert (guest / "two" / "three").read_text() == "3"
    ended = await line.run("cp", f"{NAME}:{guest}", "-")
    assert (ended.code, "two/three" in ended.stdout) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["a", "b"], Exit.INVALID),
        (["x:/a", "y:/b"], Exit.INVALID),
        (["/no/such", f"{NAME}:/tmp"], Exit.INVALID),
        ([f"{NAME}:/no/such", "here"], Exit.ERROR),
        (["/etc/hostname", f"{NAME}:/no/such/folder/x"], Exit.ERROR),
        (["nobody:/a", "here"], Exit.ERROR),
    ],
)
async def test_what_cannot_be_copied_is_told(line: Mb, arguments: list[str], exit_code: Exit) -> None:
    """With a cause and a next step, and nothing is written."""
    ended = await line.run("cp", *arguments)
    assert ended.code == exit_code
    assert "error: " in ended.stderr
    assert "next: " in ended.stderr
    assert all(len(text) <= 80 for text in ended.stderr.splitlines())


HOSTILE = {
    "climbs": tar_of([Member("../up", "x")]),
    "absolute": tar_of([Member("/tmp/up", "x")]),
    "twice": tar_of([Member("a", "x"), Member("a", "y")]),
    "below a symlink": tar_of([Member("a", link="."), Member("a/b", "x")]),
    "cut off": tar_of([Member("a", "x" * 2000)])[:1500],
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_guest_writes_nothing_elsewhere(line: Mb, desk: Desk, tmp_path: Path, name: str) -> None:
    """Whatever it sends instead of the folder's tar, nothing appears outside the place, and the copy fails."""
    sent = tmp_path / "sent"
    sent.write_bytes(b"folder\n" + HOSTILE[name])
    desk.instead = ("cat", str(sent))
    place = tmp_path / "a" / "place"
    place.parent.mkdir()
    before = sorted(tmp_path.iterdir())
    ended = await line.run("cp", f"{NAME}:/x", place)
    assert ended.code != 0
    assert sorted(tmp_path.iterdir()) == before
    assert not place.exists() or [path.name for path in place.iterdir()] in ([], ["a"])
    assert not Path("/tmp/up").exists()


async def test_a_symlink_that_leads_outside_is_left(line: Mb, desk: Desk, tmp_path: Path) -> None:
    """It is told, and the rest is copied."""
    sent = tmp_path / "sent"
    sent.write_bytes(b"folder\n" + tar_of([Member("evil", link="/etc/passwd"), Member("good", "x")]))
    desk.instead = ("cat", str(sent))
    ended = await line.run("cp", f"{NAME}:/x", tmp_path / "place")
    assert (ended.code, [path.name for path in (tmp_path / "place").iterdir()]) == (0, ["good"])
    assert "a symlink that leads outside" in ended.stderr


@pytest.mark.parametrize("script", ["yes | tr -d '\\n'", "echo file 5 x; echo 1234567", "echo nonsense"])
async def test_a_guest_that_lies_about_what_it_sends(line: Mb, desk: Desk, tmp_path: Path, script: str) -> None:
    """No header, a wrong size, another word: refused, and nothing is left here."""
    desk.instead = ("sh", "-c", script)
    ended = await line.run("cp", f"{NAME}:/x", tmp_path / "place")
    assert ended.code != 0
    assert not (tmp_path / "place").exists()


async def test_a_copy_is_made_as_whom_it_is_asked_for(line: Mb, desk: Desk, tmp_path: Path) -> None:
    """Each way runs its program as root with --user root, as the agents' user without; only without is root proposed."""
    source = tmp_path / "source"
    source.write_text("x")
    for arguments in ((source, f"{NAME}:{tmp_path}/in"), (f"{NAME}:{source}", tmp_path / "out")):
        for options, user in (((), "agent"), (("--user", "root"), "root")):
            assert (await line.run("cp", *options, *arguments)).code == 0
            assert desk.opened[-1].user == user
    for options, is_proposed in (((), True), (("--user", "root"), False)):
        failed = await line.run("cp", *options, f"{NAME}:{tmp_path}/nothing", tmp_path / "out")
        assert (failed.code, "--user root may more" in " ".join(failed.stderr.split())) == (Exit.ERROR, is_proposed)
