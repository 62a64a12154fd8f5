"""A configuration is known and typed to the last key, or refused by the name of what is wrong."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fleet.config import CONFIG_BYTES_MAX, load_config, parse_config
from fleet.errors import InvalidSpecError, NotFoundError


@dataclass(frozen=True, slots=True)
class Inner:
    path: Path
    port: int = 1


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    inner: Inner
    wait_s: float = 1.0
    is_on: bool = False
    tags: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    maybe: str | None = None
    many: tuple[Inner, ...] = ()


WHOLE = """
name = "x"
wait_s = 2
is_on = true
tags = ["a", "b"]
maybe = "m"
[sizes]
one = 1
[inner]
path = "/tmp"
[[many]]
path = "a"
port = 2
"""


def test_every_type_is_read() -> None:
    """Paths, whole numbers for seconds, lists, tables and tables of tables."""
    inner, many = Inner(Path("/tmp")), (Inner(Path("a"), 2),)
    assert parse_config(Outer, WHOLE, "f") == Outer("x", inner, 2.0, True, ("a", "b"), {"one": 1}, "m", many)


def test_defaults_stand_in() -> None:
    """What has a default may be left out."""
    assert parse_config(Outer, 'name = "x"\ninner = {path = "p"}', "f") == Outer("x", Inner(Path("p")))


WRONG = {
    "name = 1\ninner = {path = 'p'}": "name",
    "inner = {path = 'p'}": "name",
    "name = 'x'": "inner",
    "name = 'x'\ninner = {}": "inner.path",
    "name = 'x'\ninner = 'p'": "inner",
    "name = 'x'\ninner = {path = 'p', prt = 1}": "inner.prt",
    "name = 'x'\ninner = {path = 'p', port = true}": "inner.port",
    "name = 'x'\ninner = {path = 'p', port = 1.0}": "inner.port",
    "name = 'x'\ninner = {path = 'p', port = '1'}": "inner.port",
    "name = 'x'\nis_on = 1\ninner = {path = 'p'}": "is_on",
    "name = 'x'\ntags = 'a'\ninner = {path = 'p'}": "tags",
    "name = 'x'\ntags = ['a', 1]\ninner = {path = 'p'}": "tags[1]",
    "name = 'x'\nsizes = {a = 'b'}\ninner = {path = 'p'}": "sizes.a",
    "name = 'x'\nmany = [{path = 'p'}, {path = 1}]\ninner = {path = 'p'}": "many[1].path",
    "name = 'x'\nmaybe = 1\ninner = {path = 'p'}": "maybe",
    "name = 'x'\nName = 'x'\ninner = {path = 'p'}": "Name",
}


@pytest.mark.parametrize(("text", "name"), WRONG.items(), ids=range(len(WRONG)))
def test_a_wrong_key_is_named(text: str, name: str) -> None:
    """Unknown, missing or of another type: the field, the file and what it should be."""
    with pytest.raises(InvalidSpecError) as caught:
        parse_config(Outer, text, "some.toml")
    assert (caught.value.code, caught.value.field) == ("config_invalid", name)
    assert "some.toml" in caught.value.message
    assert caught.value.next_step


@pytest.mark.parametrize("text", ["name =", "= 1", "name = 'x'\nname = 'y'", "\0", "[" * 10])
def test_what_is_no_toml(text: str) -> None:
    """The parser's word and the file's name."""
    with pytest.raises(InvalidSpecError) as caught:
        parse_config(Outer, text, "some.toml")
    assert (caught.value.code, "some.toml" in caught.value.message) == ("config_syntax", True)


def test_a_file_is_read(tmp_path: Path) -> None:
    """From a path, as from a text."""
    path = tmp_path / "some.toml"
    path.write_text(WHOLE)
    assert load_config(Outer, path) == parse_config(Outer, WHOLE, "f")


@pytest.mark.parametrize("name", ["none.toml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    """Missing or a folder: not found, with its path."""
    with pytest.raises(NotFoundError) as caught:
        load_config(Outer, tmp_path / name)
    assert (caught.value.code, str(tmp_path) in caught.value.message) == ("config_unreadable", True)


def test_a_wrong_file_is_not_read_whole() -> None:
    """A device without an end is refused after the first megabyte, not cut and taken for a configuration."""
    with pytest.raises(InvalidSpecError) as caught:
        load_config(Outer, Path("/dev/zero"))
    assert str(CONFIG_BYTES_MAX) in caught.value.message


def test_the_type_of_an_unknown_value_is_said() -> None:
    """A next step names the type that is wanted."""
    values: dict[str, Any] = {"port = 'x'": "int", "path = 1": "Path"}
    for text, kind in values.items():
        with pytest.raises(InvalidSpecError) as caught:
            parse_config(Inner, text if "path" in text else f"path = 'p'\n{text}", "f")
        assert kind in caught.value.next_step
