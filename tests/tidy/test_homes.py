"""What .importlinter cannot see: asyncio's subprocesses have the same few homes as subprocess has."""

import ast
from typing import Any

HOMES = (
    "guestd.workload",
    "hostd.drivers.hypervisor",
    "hostd.drivers.image",
    "hostd.drivers.network",
    "provisioning",
    "tests",
)
STARTERS = frozenset({"create_subprocess_exec", "create_subprocess_shell"})


def starts_programs(tree: ast.AST) -> bool:
    nodes = list(ast.walk(tree))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return "asyncio.subprocess" in imported or bool(named & STARTERS)


def test_only_few_modules_start_programs(modules: Any) -> None:
    """A program is started where its failure is translated, and nowhere else."""
    strangers = [
        module.name
        for module in modules
        if starts_programs(module.tree) and not any(f"{module.name}.".startswith(f"{home}.") for home in HOMES)
    ]
    assert strangers == []
