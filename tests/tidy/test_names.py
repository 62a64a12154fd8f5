"""One word for each thing, from docs/glossary.md; words that say nothing name nothing."""

import ast
import re
from collections.abc import Iterator
from typing import Any

# Words that hide what a thing is, and words for which the glossary has another.
EMPTY_WORDS = frozenset(
    {"util", "utils", "helper", "helpers", "manager", "misc", "common", "info", "item", "items", "obj", "data", "task"}
)
# pytest's hooks name their arguments, not their functions, so no exception is needed.
DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_CODE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def empty_words(name: str) -> list[str]:
    return [word for word in _WORDS.findall(name) if word.lower() in EMPTY_WORDS]


def error_codes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and code of each error of fleet.errors that is made with a literal code."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or len(node.args) < 2:
            continue
        first = node.args[0]
        if node.func.id.endswith("Error") and isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield node.lineno, first.value


def test_files_and_folders_have_telling_names(texts: Any) -> None:
    """No file or folder is called utils, helpers, manager or the like."""
    assert [str(path) for path in texts if any(empty_words(part) for part in path.with_suffix("").parts)] == []


def test_classes_and_functions_have_telling_names(modules: Any) -> None:
    """No class or function is named with a word that says nothing."""
    found = [
        f"{module.path}:{node.lineno}: {node.name}"
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, DEFINITIONS) and empty_words(node.name)
    ]
    assert found == []


def test_error_codes_are_snake_case(modules: Any) -> None:
    """Programs that act on a code find all of them in one form."""
    codes = [
        f"{module.path}:{line}: {code}"
        for module in modules
        for line, code in error_codes(module.tree)
        if not _CODE.fullmatch(code)
    ]
    assert codes == []
