"""Our own source, read and parsed once for all tidy tests. Generated stubs (bedplate/) are not ours."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PACKAGES = ("fleet", "scheduler", "hostd", "guestd", "mb", "provisioning", "benchmarks", "simulation")
# Folders that hold no text of ours: made by tools, or by protoc.
NOT_OURS = frozenset({".git", ".venv", ".cache", ".demo", ".hypothesis", "__pycache__", "build", "dist"})
STUBS = PROJECT / "bedplate"


@dataclass(frozen=True, slots=True)
class Module:
    """One Python file: its path below the project, its dotted name, its text and its tree."""

    path: Path
    name: str
    text: str
    tree: ast.Module

    @property
    def is_test(self) -> bool:
        """Whether it lies below tests/."""
        return self.path.parts[0] == "tests"


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the checkout."""
    return PROJECT


@pytest.fixture(scope="session")
def modules() -> list[Module]:
    """Every Python file of the programs and the tests."""
    return [_parse(path) for folder in (*PACKAGES, "tests") for path in sorted((PROJECT / folder).rglob("*.py"))]


@pytest.fixture(scope="session")
def texts() -> dict[Path, str]:
    """Every text file of ours, by its path below the project."""
    return {path.relative_to(PROJECT): path.read_text() for path in _walk(PROJECT)}


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        is_tool_cache = path.name.startswith(".") and path.name.endswith("_cache")
        if path.name in NOT_OURS or path == STUBS or is_tool_cache or path.is_symlink():
            continue
        if path.is_dir():
            yield from _walk(path)
        elif b"\0" not in path.read_bytes()[:4096]:
            yield path


def _parse(path: Path) -> Module:
    text = path.read_text()
    relative = path.relative_to(PROJECT)
    return Module(relative, ".".join(relative.with_suffix("").parts), text, ast.parse(text, str(relative)))
