"""A small, deterministic repair agent: no model, no network, the same repair every time.

It runs the tests. When one fails, it says which and why, then changes one comparison or operator of the project's modules at a
time, runs the tests after each change, and keeps the first one that makes all of them pass. Exit code 0 when all tests pass, 1
when no such change makes them.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = [sys.executable, "-B", "-m", "unittest", "-v"]
TESTS_TIMEOUT_S = 60
TRIES_MAX = 200

COMPARISONS = {
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult}
SYMBOLS = {
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
}


def main() -> int:
    """Repairs the project in the current folder."""
    has_passed, report = run_tests()
    say(report)
    if has_passed:
        say("agent: all tests pass, there is nothing to repair")
        return 0
    for failure in re.findall(r"^(?:FAIL|ERROR): (\S+)", report, re.MULTILINE):
        say(f"agent: {failure} fails: {last_error(report)}")
    for number, (path, text, description) in enumerate(propose(), start=1):
        if number > TRIES_MAX:
            break
        original = path.read_text()
        path.write_text(text)
        has_passed, report = run_tests()
        say(f"agent: try {number}: {description}: {'all tests pass' if has_passed else 'tests still fail'}")
        if has_passed:
            say(report)
            return 0
        path.write_text(original)
    say("agent: no single change makes the tests pass")
    return 1


def run_tests() -> tuple[bool, str]:
    """Whether the tests pass, and what they printed."""
    try:
        done = subprocess.run(TESTS, capture_output=True, text=True, timeout=TESTS_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return False, "the tests did not end"
    return done.returncode == 0, done.stderr.rstrip()


def last_error(report: str) -> str:
    """The line that says what an assertion expected."""
    errors = re.findall(r"^\w*Error: .*", report, re.MULTILINE)
    return errors[0] if errors else "no reason given"


def propose() -> Iterator[tuple[Path, str, str]]:
    """Every single change to the project's own modules: the file, its new text, and the change in words."""
    for path in sorted(Path().glob("*.py")):
        if path.name.startswith("test_") or path.name == Path(__file__).name:
            continue
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            yield from ((path, text, f"{path}:{line}: {words}") for text, line, words in change(source, node))


def change(source: str, node: ast.AST) -> Iterator[tuple[str, int, str]]:
    """The changed text of the file, the line, and the change in words."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        old, new = type(node.ops[0]), COMPARISONS[type(node.ops[0])]
        yield replace_between(source, node.left, node.comparators[0], SYMBOLS[old], SYMBOLS[new])
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        before, after = type(node.op), OPERATORS[type(node.op)]
        yield replace_between(source, node.left, node.right, SYMBOLS[before], SYMBOLS[after])


def replace_between(source: str, left: ast.expr, right: ast.expr, old: str, new: str) -> tuple[str, int, str]:
    """`source` with the operator between two expressions replaced."""
    lines = source.splitlines(keepends=True)
    starts = [sum(map(len, lines[:index])) for index in range(len(lines))]
    assert left.end_lineno is not None
    assert left.end_col_offset is not None
    begin = starts[left.end_lineno - 1] + left.end_col_offset
    end = starts[right.lineno - 1] + right.col_offset
    text = source[:begin] + source[begin:end].replace(old, new, 1) + source[end:]
    return text, left.end_lineno, f"{old} becomes {new}"


def say(text: str) -> None:
    """Prints at once, so that it can be followed."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
