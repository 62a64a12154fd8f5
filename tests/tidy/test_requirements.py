"""What is installed is pinned by its content, wherever it is fetched from; one version is said in one place."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[^ \\]+)(?P<rest>[^\n]*(?:\n +--hash=[^\n]*)*)\n")
_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
_PACKAGE = re.compile(r'^docker\.io(?= amd64 )|"docker\.io"', re.MULTILINE)
# Joined here, because no file of ours may hold one.
REGISTRY_HOSTS = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("crates", "io"),
        ("rubygems", "org"),
        ("proxy", "golang", "org"),
        ("docker", "io"),
    )
)


def read_pins(path: Path) -> dict[str, str]:
    """Every pinned package with its version; fails for anything else in the file."""
    text = path.read_text()
    found = list(_PIN.finditer(text))
    assert "".join(one.group() for one in found) == text, f"{path.name} holds more than pins with hashes"
    assert all(_HASH.search(one["rest"]) for one in found), f"{path.name} holds a pin without a hash"
    return {one["name"]: one["version"] for one in found}


def read_project(project: Path) -> Any:
    return tomllib.loads((project / "pyproject.toml").read_text())


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~ ]", requirement)[0].lower() for requirement in requirements}


def test_every_requirement_is_pinned_by_hash(project: Path) -> None:
    """requirements/ holds pins with hashes and nothing else: no option, no address."""
    for path in sorted((project / "requirements").iterdir()):
        assert read_pins(path)


def test_the_pins_cover_what_the_project_asks_for(project: Path) -> None:
    """dev.txt installs what the fast part needs, host.txt what a host needs, in the same versions."""
    table = read_project(project)["project"]
    dev, host = (read_pins(project / "requirements" / f"{name}.txt") for name in ("dev", "host"))
    extras = table["optional-dependencies"]
    assert names(table["dependencies"] + extras["dev"]) <= set(dev)
    assert names(table["dependencies"] + extras["host"]) <= set(host)
    assert {name: dev[name] for name in host if name in dev} == {name: host[name] for name in host if name in dev}
    # It compiles against libvirt, which the fast part does without.
    assert "libvirt-python" not in dev


def test_no_file_names_a_registry(texts: Any) -> None:
    """Where packages come from is the machine's setting, never this repository's."""
    plain = {path: _without_package_names(path, text) for path, text in texts.items()}
    found = [f"{path}: {host}" for path, text in plain.items() for host in REGISTRY_HOSTS if host in text]
    assert found == []


def _without_package_names(path: Path, text: str) -> str:
    """One of Debian's packages is called like a registry: in a recipe or its lock, as a whole name, it is the package."""
    return _PACKAGE.sub("", text) if path.parts[:2] == ("provisioning", "recipes") else text


def test_versions_agree(project: Path) -> None:
    """pyproject.toml says which version this is and which Python is the oldest; everything else follows it."""
    table = read_project(project)
    assert version("bedplate") == table["project"]["version"]
    oldest = table["project"]["requires-python"].removeprefix(">=")
    assert table["tool"]["mypy"]["python_version"] == oldest
    assert table["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
