"""The reference page says what the program does: it is made of the model, and every row has a test behind it."""

import ast
import re
from pathlib import Path

import pytest

from mb.jcard.field import Field
from mb.jcard.fields import FIELDS
from mb.jcard.parse import read_jcard
from mb.jcard.reference import render_reference
from mb.jcard.table import Reading

PROJECT = Path(__file__).parents[3]
EVERYTHING = """
[network]
forwards = [{}]
[[shared]]
[secrets]
NAME = "x"
[requires]
NAME = "x"
[placement.tolerates]
NAME = "x"
[placement.prefers]
NAME = "x"
[[agents]]
env = { NAME = "x" }
gang = true
"""


def test_the_page_is_the_model() -> None:
    """docs/jcard.md is what `python -m mb.jcard.reference` prints now."""
    assert (PROJECT / "docs" / "jcard.md").read_text() == render_reference()


def asked_fields() -> set[str]:
    """Every field that the parser looks for, in the names of the table of fields."""
    found = set()
    for text in (EVERYTHING, EVERYTHING.replace("[[agents]]", "[agent]")):
        reading = Reading({})
        read_jcard(text, Path("/work/x"), reading)
        found |= {re.sub(r"\[\[(.*?)\]\]\[\d+\]", r"\1", name) for name in reading.asked}
    found = {re.sub(r"^agents\.", "agent.", name) for name in found}
    own = ("secrets", "requires", "placement.tolerates", "placement.prefers", "agent.env")
    found = {re.sub(rf"^({'|'.join(map(re.escape, own))})\.NAME$", r"\1.*", name) for name in found}
    tables = {"resources", "network", "placement", "budget", "limits", *own}
    return found - tables


def test_every_field_that_is_read_has_its_row() -> None:
    """No field is read that the page does not tell, and none is told that is not read."""
    assert asked_fields() == {field.name for field in FIELDS}


@pytest.mark.parametrize("field", FIELDS, ids=[field.name for field in FIELDS])
def test_every_row_names_tests_that_exist(field: Field) -> None:
    """A proof is a test that can be run."""
    assert field.tests
    for test in field.tests:
        path, _, name = test.partition("::")
        tree = ast.parse((PROJECT / path).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in functions, test
