"""Right uses pass both type checkers in strict mode, and wrong ones are reported."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

from support.type_checkers import mypy_errors_in, pyright_errors_in

PROGRAMS = Path(__file__).parent / "typed_programs"


@pytest.mark.long
@pytest.mark.parametrize("check", [mypy_errors_in, pyright_errors_in])
def test_right_uses_pass_and_wrong_ones_are_refused(
    check: Callable[[Path], dict[tuple[str, int], str]], tmp_path: Path
) -> None:
    """
    A checker has nothing to say of right.py, and of each wrong program exactly that its marked line is wrong.

    It runs without the network, and sees the types of the library.
    """
    folder = Path(copytree(PROGRAMS, tmp_path / "typing"))
    marked = {
        (path.name, number)
        for path in folder.glob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"# refused$", line)
    }
    wrong = {path.name for path in folder.glob("wrong_*.py")}
    assert len(wrong) >= 6
    assert {name for name, _ in marked} == wrong

    found = check(folder)

    assert {place: text for place, text in found.items() if place not in marked} == {}
    assert set(found) == marked
    assert ['"int"' in text for (name, _), text in found.items() if name == "wrong_units.py"] == [True]
