"""The page of reliability, and the tests it names."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

HOME = Path(__file__).parents[2]
LAST = {"A": 16, "B": 8, "C": 28, "D": 23, "I": 22}
ROWS = [f"{letter}{n}" for letter, last in LAST.items() for n in range(1, last + 1)]
"""The rows of the failure table, and the invariants, that were there from the start; later ones have any free number."""
_TEST = re.compile(r"`(tests/[\w/]+\.py::[\w:]+)`")


def page() -> str:
    return (HOME / "docs" / "reliability.md").read_text()


def table() -> dict[str, set[str]]:
    """Return row → the tests that the page names for it, as ``tests/file.py::name``."""
    lines = re.findall(r"^\| ([A-DI]\d+) \|(.*)$", page(), flags=re.MULTILINE)
    twice = [row for row, count in Counter(row for row, _ in lines).items() if count > 1]
    assert twice == []
    return {row: set(_TEST.findall(text)) for row, text in lines}


def later() -> list[str]:
    """Return the rows that the page says wait for a feature."""
    section = page().partition("### Later\n")[2].partition("\n#")[0]
    return [row for rows in re.findall(r"^\* ([^:]*):", section, flags=re.MULTILINE) for row in rows.split(", ")]


def marked() -> dict[str, set[str]]:
    """Return the tests that are marked with rows: ``tests/file.py::name`` → rows, `pytest.param` marks included."""
    found: dict[str, set[str]] = {}
    for path in (HOME / "tests").rglob("test_*.py"):
        place = path.relative_to(HOME)
        tree = ast.parse(path.read_text())
        tests = [(node.name, node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            inner = (node for node in kind.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
            tests += [(f"{kind.name}::{node.name}", node) for node in inner]
        for name, node in tests:
            rows = {row for decorator in node.decorator_list for row in _rows(decorator)}
            if rows:
                found[f"{place}::{name}"] = rows
    return found


def _rows(decorator: ast.expr) -> list[str]:
    calls = (node for node in ast.walk(decorator) if isinstance(node, ast.Call))
    names = (node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == "row")
    return [str(argument.value) for call in names for argument in call.args if isinstance(argument, ast.Constant)]


def test_every_row_is_stated_once() -> None:
    """Each row of the failure table and each invariant stands on the page with a test, or in the list of those that wait for a feature."""
    stated = table()

    assert [row for row, tests in stated.items() if not tests] == []
    assert [row for row in later() if row in stated] == []
    assert {*ROWS} - {*stated, *later()} == set()


def test_every_test_named_is_marked_with_its_row() -> None:
    """The page names a test for a row exactly when the test is marked with it."""
    marks = marked()
    named = {(test, row) for row, tests in table().items() for test in tests}

    assert named - {(test, row) for test, rows in marks.items() for row in rows} == set()
    assert {(test, row) for test, rows in marks.items() for row in rows} - named == set()


def test_every_line_of_a_table_is_whole() -> None:
    """Each row says what happens, what is done, and how often it is tried; an invariant, what is true."""
    lines = re.findall(r"^\| [A-DI]\d+ \|.*$", page(), flags=re.MULTILINE)

    assert [line for line in lines if len(line.split(" | ")) != (3 if line[2] == "I" else 5) or "|  |" in line] == []
