"""The documents say what is true: keys, decisions, dependencies and links."""

import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

from fleet.store import keyspace
from fleet.store.keyspace import LEADER

# The parts of a decision page, in this order.
HEADINGS = ["Status", "Context", "Decision", "Consequences", "What else was weighed"]
DECISION_LINES_MAX = 60

_DECISION = re.compile(r"(\d{4})-[a-z0-9-]+\.md")
_CITED = re.compile(r"docs/decisions/(\d{4})")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_KEY_ROW = re.compile(r"^\| `(/bedplate/[^`]+)` \|(.*)\|$", re.MULTILINE)


def known_keys() -> set[str]:
    """Every key that fleet.store.keyspace can make, with `<parameter>` for each segment."""
    makers = [make for name, make in inspect.getmembers(keyspace, inspect.isfunction) if name.endswith("_key")]
    return {LEADER, *(make(*(f"<{name}>" for name in inspect.signature(make).parameters)) for make in makers)}


def decisions(project: Path) -> dict[str, Path]:
    pages = [path for path in (project / "docs" / "decisions").iterdir() if path.name != "README.md"]
    assert all(_DECISION.fullmatch(path.name) for path in pages)
    return {path.name[:4]: path for path in sorted(pages)}


def test_the_keyspace_page_lists_every_key(project: Path) -> None:
    """docs/keyspace.md has one row for each key, with writer, readers, lease and lifetime, and none for a key that is gone."""
    rows = _KEY_ROW.findall((project / "docs" / "keyspace.md").read_text())
    assert {key for key, _ in rows} == known_keys()
    assert [key for key, rest in rows if len(rest.split("|")) != 5 or not all(map(str.strip, rest.split("|")))] == []


def test_every_decision_has_its_parts(project: Path) -> None:
    """A decision page is short and says status, context, decision, consequences and what else was weighed."""
    for number, path in decisions(project).items():
        text = path.read_text()
        assert text.startswith(f"# {number}: "), path.name
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS, path.name
        assert text.count("\n") <= DECISION_LINES_MAX, path.name


def test_decisions_are_listed_in_order(project: Path) -> None:
    """The index links every page; numbers are given once."""
    pages = decisions(project)
    listed = _LINK.findall((project / "docs" / "decisions" / "README.md").read_text())
    assert listed == [path.name for path in pages.values()]
    assert len(list((project / "docs" / "decisions").glob("[0-9]*.md"))) == len(pages)


def test_cited_decisions_exist(project: Path, texts: Any) -> None:
    """A comment that cites a decision leads to its page."""
    numbers = decisions(project)
    cited = [(str(path), number) for path, text in texts.items() for number in _CITED.findall(text)]
    assert [one for one in cited if one[1] not in numbers] == []


def test_every_dependency_has_a_decision(project: Path) -> None:
    """Whoever wonders why something is installed finds a page that names it."""
    table = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    wanted = [*table["dependencies"], *(one for extra in table["optional-dependencies"].values() for one in extra)]
    pages = "".join(path.read_text() for path in decisions(project).values())
    missing = {name for one in wanted if f"`{(name := re.split('[<>=]', one)[0])}`" not in pages}
    assert missing == set()


def test_links_resolve(project: Path, texts: Any) -> None:
    """A link in a document leads to a file that exists."""
    broken = [
        f"{path}: {target}"
        for path, text in texts.items()
        if path.suffix == ".md"
        for target in _LINK.findall(text)
        if "://" not in target and not (project / path.parent / target.split("#")[0]).exists()
    ]
    assert broken == []
