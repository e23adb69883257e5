"""Statements as text with question marks, and what a driver wants instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count

_MARKS = {"qmark": "?", "format": "%s", "pyformat": "%s", "numeric": ":{}", "numeric_dollar": "${}", "named": ":p{}"}
MOST_ROWS, MOST_BYTES = 100, 1_000_000
"""What one INSERT carries: SQLite once took no more than 999 parameters, MySQL has a limit in bytes."""


@lru_cache(256)
def spelled(sql: str, style: str) -> str:
    """Return *sql* with the question marks that the driver wants instead."""
    numbers = count(1)
    return re.sub(r"\?", lambda _: _MARKS[style].format(next(numbers)), sql)


def given(values: Sequence[object], style: str) -> tuple[object, ...] | Mapping[str, object]:
    """Return the values as the driver wants them."""
    if style == "named":
        return {f"p{number}": value for number, value in enumerate(values, 1)}
    return tuple(values)


def known_style(style: str) -> bool:
    """Tell whether that ``paramstyle`` is one of ours."""
    return style in _MARKS


def insertions(head: str, rows: Sequence[tuple[object, ...]]) -> Iterator[tuple[str, list[object]]]:
    """Yield statements and values that insert *rows*, in order; the last column decides how many go in one."""
    values: list[object] = []
    taken = size = 0
    for row in rows:
        length = len(row[-1]) if isinstance(row[-1], bytes) else 0
        if taken and (taken == MOST_ROWS or size + length > MOST_BYTES):
            yield _insertion(head, taken, len(row)), values
            values, taken, size = [], 0, 0
        values += row
        taken, size = taken + 1, size + length
    if taken:
        yield _insertion(head, taken, len(rows[0])), values


def _insertion(head: str, rows: int, columns: int) -> str:
    marks = "(" + ", ".join("?" * columns) + ")"
    return f"{head} VALUES {', '.join([marks] * rows)}"
