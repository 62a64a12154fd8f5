"""Locks: exact packages by version and digest, written one way, and every way out of a lock that does not fit is named."""

import hashlib
from pathlib import Path

import pytest

from fleet.errors import InvalidSpecError, NotFoundError, UnavailableError
from provisioning.lock import Lock, LockedPackage, describe_difference, encode_lock, parse_lock
from provisioning.packages import ensure_debs, load_lock, lock_path
from provisioning.packagesource import parse_targets
from provisioning.recipe import list_recipes, load_recipe, request_digest

WANTED = "0" * 64
GIT = LockedPackage("git", "amd64", "1:2.47.3-0+deb13u1", "a" * 64)
TZDATA = LockedPackage("tzdata", "all", "2025b-4+deb13u1", "b" * 64)
TEXT = encode_lock(Lock(WANTED, (TZDATA, GIT)))


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_locked(name: str) -> None:
    """A recipe whose packages changed is committed with the lock for them; no build chooses versions of its own."""
    recipe = load_recipe(name)
    lock = load_lock(recipe)
    assert set(recipe.rootfs.packages) <= {one.name for one in lock.packages}
    assert "/" not in lock_path(recipe).read_text()


def test_a_lock_survives_the_round_trip_in_one_order() -> None:
    """The same packages are the same text, so that a difference in a commit is a difference in packages."""
    assert parse_lock(TEXT, "base") == Lock(WANTED, (GIT, TZDATA))
    assert TEXT.splitlines()[1].startswith("git amd64 1:2.47.3-0+deb13u1 aaaa")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "for nobody\n",
        TEXT.removeprefix("for "),
        TEXT + "\n",
        TEXT.replace("amd64", ""),
        TEXT.replace("a" * 64, "A" * 64),
        TEXT.replace("git ", "../git "),
        TEXT + TEXT.splitlines()[1] + "\n",
        TEXT.replace("1:2.47.3", "1:2.47.3;reboot"),
    ],
)
def test_an_odd_lock_is_refused(text: str) -> None:
    """What names the bytes of an image is never read with good will."""
    with pytest.raises(InvalidSpecError) as refused:
        parse_lock(text, "base")
    assert (refused.value.code, "lock --recipe base" in refused.value.next_step) == ("lock_invalid", True)


def test_a_lock_for_other_packages_is_stale(tmp_path: Path) -> None:
    """A package added to a recipe without a new lock is an error with the command that mends it, not a guess."""
    recipe = load_recipe("base")
    with pytest.raises(NotFoundError, match="has no lock"):
        load_lock(recipe, tmp_path)
    lock_path(recipe, tmp_path).write_text(TEXT)
    with pytest.raises(UnavailableError) as refused:
        load_lock(recipe, tmp_path)
    assert (refused.value.code, "lock --recipe base" in refused.value.next_step) == ("lock_stale", True)
    lock_path(recipe, tmp_path).write_text(TEXT.replace(WANTED, request_digest(recipe.rootfs)))
    assert load_lock(recipe, tmp_path).packages == (GIT, TZDATA)


def test_a_tree_that_differs_from_the_lock_is_described() -> None:
    """The error says which package is there and which is not."""
    lock = parse_lock(TEXT, "base")
    assert describe_difference(lock, [("git", GIT.version), ("tzdata", TZDATA.version)]) == ""
    said = describe_difference(lock, [("git", "1:2.48"), ("tzdata", TZDATA.version)])
    assert said == f"without git={GIT.version}; with git=1:2.48"


def test_kept_packages_need_no_source_and_damaged_ones_are_not_kept(tmp_path: Path) -> None:
    """With every package in the cache nobody is asked; one whose bytes changed is thrown away rather than installed."""
    content = b"a package"
    digest = hashlib.sha256(content).hexdigest()
    lock = Lock(WANTED, (LockedPackage("git", "amd64", "1", digest),))
    (tmp_path / f"{digest}.deb").write_bytes(content)
    said: list[str] = []
    ensure_debs(load_recipe("base"), lock, tmp_path, said.append)
    assert said == []
    (tmp_path / f"{digest}.deb").write_bytes(b"another")

    def stop(step: str) -> None:
        raise RuntimeError(step)

    with pytest.raises(RuntimeError, match="download 1 packages"):
        ensure_debs(load_recipe("base"), lock, tmp_path, stop)
    assert list(tmp_path.iterdir()) == []


def test_only_debian_itself_is_asked_for_another_release() -> None:
    """The machine's mirrors are used for the image's release; other publishers' repositories are not Debian's."""
    targets = """\
mirror:/debian/ bookworm main
mirror:/debian/ bookworm-updates main
mirror:/debian/ bookworm contrib
mirror:/security/ bookworm-security main
elsewhere:/tools/ bookworm stable
elsewhere:/sdk/ cloud-sdk-bookworm main
elsewhere:/node/ nodistro main

odd
"""
    lines = [line.split("] ")[1] for line in parse_targets(targets, "bookworm", "trixie")]
    assert lines == [
        "mirror:/debian/ trixie main",
        "mirror:/debian/ trixie-updates main",
        "mirror:/security/ trixie-security main",
    ]
    assert [line.split("] ")[1] for line in parse_targets("m:/debian/ stable main", "trixie", "trixie")] == [
        "m:/debian/ trixie main"
    ]
