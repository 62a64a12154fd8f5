"""What goes into an image, as data: the recipes folder read into frozen records. Knows nothing of how it is built."""

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fleet.errors import InvalidSpecError, NotFoundError

RECIPES_DIR = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True)
class RootfsRecipe:
    """The slow part: which packages of which release."""

    suite: str
    variant: str
    architecture: str
    packages: tuple[str, ...]
    path_exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class User:
    """An account with a locked password, a group of its own and a home."""

    name: str
    uid: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """One image; `digest` covers every byte of its file."""

    name: str
    architecture: str
    link_version: int
    epoch_s: int
    cmdline: tuple[str, ...]
    rootfs: RootfsRecipe
    early_modules: tuple[str, ...]
    modules: tuple[str, ...]
    root_uuid: str
    build_only: tuple[str, ...]
    remove: tuple[str, ...]
    users: tuple[User, ...]
    mask_units: tuple[str, ...]
    mask_generators: tuple[str, ...]
    files: tuple[tuple[str, str], ...]
    digest: str


def load_recipe(name: str, recipes_dir: Path = RECIPES_DIR) -> Recipe:
    """Reads the recipe `name`. Raises NotFoundError or, for a broken file, InvalidSpecError."""
    path = recipes_dir / f"{name}.toml"
    if "/" in name or not path.is_file():
        known = ", ".join(sorted(found.stem for found in recipes_dir.glob("*.toml")))
        raise NotFoundError("recipe_not_found", f"there is no recipe {name!r}", f"use one of: {known}")
    content = path.read_bytes()
    try:
        return parse_recipe(content)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidSpecError("recipe_invalid", f"{path}: {error!r}", "correct the recipe") from error


def parse_recipe(content: bytes) -> Recipe:
    """Turns a recipe's TOML into a Recipe. Raises KeyError, TypeError or ValueError for what does not fit."""
    table: dict[str, Any] = tomllib.loads(content.decode())
    rootfs = table["rootfs"]
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
            path_exclude=_strings(rootfs["path_exclude"]),
        ),
        early_modules=_strings(table["kernel"]["early_modules"]),
        modules=_strings(table["kernel"]["modules"]),
        root_uuid=str(table["root"]["uuid"]),
        build_only=_strings(table["root"]["build_only"]),
        remove=tuple(_inside(pattern) for pattern in _strings(table["root"]["remove"])),
        users=tuple(User(str(user["name"]), int(user["uid"])) for user in table["user"]),
        mask_units=_strings(table["systemd"]["mask"]),
        mask_generators=_strings(table["systemd"]["mask_generators"]),
        files=tuple((_inside(path), str(text)) for path, text in sorted(table["file"].items())),
        digest=hashlib.sha256(content).hexdigest(),
    )


def rootfs_key(rootfs: RootfsRecipe, epoch_s: int) -> str:
    """Names the package tree: 64 hex digits over everything that decides its content, and nothing else."""
    described = json.dumps({"rootfs": asdict(rootfs), "epoch_s": epoch_s}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _strings(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"a list of strings is needed, not {values!r}")
    return tuple(values)


def _inside(path: str) -> str:
    """A path or pattern that stays below the root it is joined to."""
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} leaves the root")
    return path
