"""What goes into an image, as data: the recipes folder read into frozen records. Knows nothing of how it is built.

A recipe may extend another: lists grow, tables are merged, everything else is replaced.
"""

import hashlib
import json
import re
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fleet.errors import InvalidSpecError, NotFoundError

RECIPES_DIR = Path(__file__).parent / "recipes"
# A recipe on a recipe on a recipe: more would be a puzzle, and a circle has no end.
EXTENDS_MAX = 3

_SYSCTL = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")


@dataclass(frozen=True, slots=True)
class RootfsRecipe:
    """The slow part: which packages of which release. `build_only` are for the builder and leave the tree again."""

    suite: str
    variant: str
    architecture: str
    packages: tuple[str, ...]
    build_only: tuple[str, ...]
    path_exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class User:
    """An account with a locked password, a group of its own and a home."""

    name: str
    uid: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """One image; `digest` covers every byte of its file and of those it extends."""

    name: str
    architecture: str
    link_version: int
    epoch_s: int
    cmdline: tuple[str, ...]
    rootfs: RootfsRecipe
    early_modules: tuple[str, ...]
    modules: tuple[str, ...]
    root_uuid: str
    remove: tuple[str, ...]
    users: tuple[User, ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    mask_units: tuple[str, ...]
    mask_generators: tuple[str, ...]
    sysctls: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str], ...]
    digest: str


def list_recipes(recipes_dir: Path = RECIPES_DIR) -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(found.stem for found in recipes_dir.glob("*.toml"))


def load_recipe(name: str, recipes_dir: Path = RECIPES_DIR) -> Recipe:
    """Reads the recipe `name`. Raises NotFoundError or, for a broken file, InvalidSpecError."""
    contents = [_read(name, recipes_dir)]
    try:
        while base := tomllib.loads(contents[0].decode()).get("extends"):
            if len(contents) > EXTENDS_MAX:
                raise ValueError(f"more than {EXTENDS_MAX} recipes extend each other")
            contents.insert(0, _read(str(base), recipes_dir))
        return parse_recipe(*contents)
    except (KeyError, TypeError, ValueError) as error:
        path = recipes_dir / f"{name}.toml"
        raise InvalidSpecError("recipe_invalid", f"{path}: {error!r}", "correct the recipe") from error


def parse_recipe(*contents: bytes) -> Recipe:
    """Turns the TOML of a recipe, after that of those it extends, into a Recipe.

    Raises KeyError, TypeError or ValueError for what does not fit.
    """
    table: dict[str, Any] = {}
    for content in contents:
        table = _merged(table, tomllib.loads(content.decode()))
    rootfs, systemd = table["rootfs"], table["systemd"]
    unmasked = _strings(systemd.get("unmask", []))
    return Recipe(
        name=str(table["name"]),
        architecture=str(table["architecture"]),
        link_version=int(table["link_version"]),
        epoch_s=int(table["epoch_s"]),
        cmdline=_strings(table["cmdline"]),
        rootfs=RootfsRecipe(
            suite=str(rootfs["suite"]),
            variant=str(rootfs["variant"]),
            architecture=str(rootfs["architecture"]),
            packages=_strings(rootfs["packages"]),
            build_only=_strings(rootfs["build_only"]),
            path_exclude=_strings(rootfs["path_exclude"]),
        ),
        early_modules=_strings(table["kernel"]["early_modules"]),
        modules=_strings(table["kernel"]["modules"]),
        root_uuid=str(table["root"]["uuid"]),
        remove=tuple(_inside(pattern) for pattern in _strings(table["root"]["remove"])),
        users=tuple(User(str(user["name"]), int(user["uid"])) for user in table["user"]),
        groups=tuple((str(name), _strings(members)) for name, members in sorted(table.get("group", {}).items())),
        mask_units=tuple(unit for unit in _strings(systemd["mask"]) if unit not in unmasked),
        mask_generators=_strings(systemd["mask_generators"]),
        sysctls=tuple((_sysctl(key), str(value)) for key, value in sorted(table["sysctl"].items())),
        files=tuple((_inside(path), str(text)) for path, text in sorted(table["file"].items())),
        digest=hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest(),
    )


def request_digest(rootfs: RootfsRecipe) -> str:
    """Names what a lock answers: 64 hex digits over the release and the packages asked for."""
    wanted = [rootfs.suite, rootfs.variant, rootfs.architecture, sorted({*rootfs.packages, *rootfs.build_only})]
    return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()


def rootfs_key(recipe: Recipe, lock_text: str) -> str:
    """Names the package tree: 64 hex digits over everything that decides its content, and nothing else."""
    described = {"rootfs": asdict(recipe.rootfs), "epoch_s": recipe.epoch_s, "lock": lock_text}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _read(name: str, recipes_dir: Path) -> bytes:
    path = recipes_dir / f"{name}.toml"
    if "/" in name or not path.is_file():
        known = ", ".join(list_recipes(recipes_dir))
        raise NotFoundError("recipe_not_found", f"there is no recipe {name!r}", f"use one of: {known}")
    return path.read_bytes()


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in more.items():
        known = base.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            result[key] = _merged(known, value)
        elif isinstance(known, list) and isinstance(value, list):
            result[key] = [*known, *(one for one in value if one not in known)]
        else:
            result[key] = value
    return result


def _strings(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"a list of strings is needed, not {values!r}")
    return tuple(values)


def _inside(path: str) -> str:
    """A path or pattern that stays below the root it is joined to."""
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} leaves the root")
    return path


def _sysctl(key: str) -> str:
    """The name of a kernel parameter: words and dots."""
    if not _SYSCTL.fullmatch(key):
        raise ValueError(f"{key!r} is no kernel parameter")
    return key
