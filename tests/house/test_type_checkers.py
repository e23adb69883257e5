"""The type checkers that the typing tests lean on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.type_checkers import mypy_errors, pyright_errors


@pytest.mark.parametrize("check", [mypy_errors, pyright_errors])
def test_checker_knows_the_library(check: Callable[[Path], dict[int, str]], tmp_path: Path) -> None:
    """Each checker runs without the network, sees the library's types, and reports exactly the wrong line."""
    program = tmp_path / "program.py"
    program.write_text(
        'from conveyor.units import milliseconds\nright: int = milliseconds("5s")\nwrong: str = milliseconds("5s")\n'
    )

    errors = check(program)

    assert list(errors) == [3]
    assert '"int"' in errors[3]
