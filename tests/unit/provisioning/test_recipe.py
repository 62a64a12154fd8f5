"""Recipes: what is in the repository can be read, what is broken is refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest

from fleet.errors import InvalidSpecError, NotFoundError
from provisioning.recipe import RECIPES_DIR, load_recipe, request_digest, rootfs_key

BASE = (RECIPES_DIR / "base.toml").read_text()


def test_the_base_recipe_has_what_guests_are_promised() -> None:
    """Agents run as `agent` (1001) beside `admin` (1000), with Python, git and certificates, and without sudo."""
    recipe = load_recipe("base")
    assert {user.name: user.uid for user in recipe.users} == {"admin": 1000, "agent": 1001}
    assert {"python3", "git", "ca-certificates", "systemd"} <= set(recipe.rootfs.packages)
    assert "sudo" not in recipe.rootfs.packages


def test_only_packages_and_time_name_the_package_tree() -> None:
    """A change of guestd, users or units must not install packages again; a change of packages or of their lock must."""
    recipe = load_recipe("base")
    more = replace(recipe, rootfs=replace(recipe.rootfs, packages=(*recipe.rootfs.packages, "vim")))
    later = replace(recipe, epoch_s=recipe.epoch_s + 1)
    unmasked = replace(recipe, mask_units=(), users=())
    assert rootfs_key(unmasked, "lock") == rootfs_key(recipe, "lock")
    keys = {rootfs_key(recipe, "lock"), rootfs_key(more, "lock"), rootfs_key(later, "lock"), rootfs_key(recipe, "new")}
    assert len(keys) == 4


def test_the_order_of_packages_asks_for_nothing_new() -> None:
    """A lock answers which packages are wanted, so only another set of them makes it stale."""
    rootfs = load_recipe("base").rootfs
    turned = replace(rootfs, packages=rootfs.packages[::-1], path_exclude=())
    assert request_digest(turned) == request_digest(rootfs)
    assert request_digest(replace(rootfs, packages=rootfs.packages[1:])) != request_digest(rootfs)


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    """Lists grow, tables merge, single values are replaced, a mask can be taken back; both files name the recipe."""
    (tmp_path / "base.toml").write_text(BASE)
    child = """
name = "more"
extends = "base"
[rootfs]
packages = ["git", "vim"]
[root]
uuid = "0bed91a7-e000-4000-8000-000000000001"
[systemd]
unmask = ["tmp.mount"]
[group]
systemd-journal = ["agent"]
[file]
"etc/hostname" = "more"
"""
    (tmp_path / "more.toml").write_text(child)
    base, more = load_recipe("base", tmp_path), load_recipe("more", tmp_path)
    assert more.rootfs.packages == (*base.rootfs.packages, "vim")
    assert (more.name, more.root_uuid[-1], more.users) == ("more", "1", base.users)
    assert set(base.mask_units) - set(more.mask_units) == {"tmp.mount"}
    assert dict(more.files) == {**dict(base.files), "etc/hostname": "more"}
    assert more.groups == (("systemd-journal", ("agent",)),)
    (tmp_path / "base.toml").write_text(BASE + "\n")
    assert load_recipe("more", tmp_path).digest != more.digest


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    """A circle ends as an error, not as a builder that hangs."""
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\nextends = "{base}"\n')
    with pytest.raises(InvalidSpecError, match="extend each other"):
        load_recipe("a", tmp_path)


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
