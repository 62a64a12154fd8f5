"""Recipes: what is in the repository can be read, what is broken is refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest

from fleet.errors import InvalidSpecError, NotFoundError
from provisioning.recipe import RECIPES_DIR, load_recipe, rootfs_key

BASE = (RECIPES_DIR / "base.toml").read_text()


def test_the_base_recipe_has_what_guests_are_promised() -> None:
    """Agents run as `agent` (1001) beside `admin` (1000), with Python, git and certificates, and without sudo."""
    recipe = load_recipe("base")
    assert {user.name: user.uid for user in recipe.users} == {"admin": 1000, "agent": 1001}
    assert {"python3", "git", "ca-certificates", "systemd"} <= set(recipe.rootfs.packages)
    assert "sudo" not in recipe.rootfs.packages


def test_only_packages_and_time_name_the_package_tree() -> None:
    """A change of guestd, users or units must not fetch packages again; a change of packages must."""
    recipe = load_recipe("base")
    key = rootfs_key(recipe.rootfs, recipe.epoch_s)
    more = replace(recipe.rootfs, packages=(*recipe.rootfs.packages, "vim"))
    assert rootfs_key(load_recipe("base").rootfs, recipe.epoch_s) == key
    assert len({key, rootfs_key(more, recipe.epoch_s), rootfs_key(recipe.rootfs, recipe.epoch_s + 1)}) == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"tmp/*",', '"../tmp/*",'),
        ('"etc/hostname"', '"/etc/hostname"'),
        ("uid = 1001", 'uid = "first"'),
        ("[rootfs]", "[roots]"),
        ('"e2fsprogs"', "7"),
        ("[kernel]", "[kernel"),
    ],
)
def test_a_broken_recipe_is_refused(tmp_path: Path, old: str, new: str) -> None:
    """Nothing in a recipe may reach outside the tree it builds, and no field is guessed."""
    assert old in BASE
    (tmp_path / "base.toml").write_text(BASE.replace(old, new, 1))
    with pytest.raises(InvalidSpecError) as refused:
        load_recipe("base", tmp_path)
    assert refused.value.code == "recipe_invalid"


@pytest.mark.parametrize("name", ["absent", "../recipes/base"])
def test_a_recipe_is_found_by_plain_name_only(name: str) -> None:
    """A name is not a path, and an unknown one names those that exist."""
    with pytest.raises(NotFoundError) as refused:
        load_recipe(name)
    assert "base" in refused.value.next_step
