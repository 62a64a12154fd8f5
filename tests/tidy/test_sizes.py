"""Nothing of ours grows past what one reads in one sitting."""

import ast
from collections.abc import Iterator
from typing import Any

MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
PUBLIC_METHODS_MAX = 15
# The receiver and keyword-only parameters apart.
PARAMETERS_MAX = 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: Function) -> int:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_modules_stay_short(modules: Any) -> None:
    """No module is longer than 500 lines."""
    lengths = {str(module.path): module.text.count("\n") for module in modules}
    assert {path: length for path, length in lengths.items() if length > MODULE_LINES_MAX} == {}


def test_functions_stay_short(modules: Any) -> None:
    """No function is longer than 70 lines, its docstring included."""
    lengths = {
        f"{module.path}:{function.lineno}": (function.end_lineno or 0) - function.lineno + 1
        for module in modules
        for function in functions(module.tree)
    }
    assert {place: length for place, length in lengths.items() if length > FUNCTION_LINES_MAX} == {}


def test_functions_take_few_parameters(modules: Any) -> None:
    """Past six parameters, what belongs together is a record, or is named at the call."""
    counts = {
        f"{module.path}:{function.lineno}": parameters(function)
        for module in modules
        for function in functions(module.tree)
    }
    assert {place: count for place, count in counts.items() if count > PARAMETERS_MAX} == {}


def test_classes_stay_small(modules: Any) -> None:
    """No class has more than fifteen public methods."""
    counts = {
        f"{module.path}:{node.name}": sum(
            isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and not part.name.startswith("_")
            for part in node.body
        )
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    assert {name: count for name, count in counts.items() if count > PUBLIC_METHODS_MAX} == {}
