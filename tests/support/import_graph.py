"""The imports among the modules of a tree, and their cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Tree = Mapping[str, str]
"""Dotted module name → source; a package under its own name."""


@dataclass(frozen=True)
class Import:
    """Module *source* imports module *target* in *line*."""

    source: str
    target: str
    line: int


def read_tree(root: Path) -> dict[str, str]:
    """Return every module under the package directory *root*."""
    tree = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        tree[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return tree


def find_imports(tree: Tree) -> list[Import]:
    """Return the imports among the modules of *tree*, those in functions and under TYPE_CHECKING too."""
    packages = {name.rpartition(".")[0] for name in tree}
    return [
        Import(name, target, node.lineno)
        for name, source in tree.items()
        for node in ast.walk(ast.parse(source))
        for target in _targets(node, name if name in packages else name.rpartition(".")[0], tree)
        if target != name
    ]


def _targets(node: ast.AST, package: str, tree: Tree) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in tree)
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*above, *([module] if module else [])])
        for alias in node.names:
            submodule = f"{module}.{alias.name}"
            if submodule in tree:
                yield submodule
            elif module in tree:
                yield module


def find_cycles(imports: list[Import]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or not (Tarjan's components of more than one)."""
    edges: dict[str, set[str]] = {}
    for item in imports:
        edges.setdefault(item.source, set()).add(item.target)
        edges.setdefault(item.target, set())
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                cycles.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return cycles
