"""A reader learns from each file what it is for, and from each test what it protects."""

import ast
from typing import Any


def test_every_module_says_what_it_owns(modules: Any) -> None:
    """Only an empty file has no docstring."""
    silent = [str(module.path) for module in modules if module.text.strip() and not ast.get_docstring(module.tree)]
    assert silent == []


def test_every_test_states_the_truth_it_protects(modules: Any) -> None:
    """When a test fails, its docstring says what is no longer true."""
    silent = [
        f"{module.path}:{node.lineno}: {node.name}"
        for module in modules
        if module.is_test
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []
