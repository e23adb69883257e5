"""The page of errors and the codes in the source."""

from __future__ import annotations

import re
from pathlib import Path

HOME = Path(__file__).parents[2]


def test_every_code_has_its_place_on_the_page() -> None:
    """docs/errors.md explains exactly the codes that the source uses, in order, each with a remedy."""
    sources = "".join(path.read_text() for path in (HOME / "src").rglob("*.py"))
    page = (HOME / "docs" / "errors.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    codes = [section.split("\n", 1)[0] for section in sections]

    assert codes == sorted(set(re.findall(r"\bE\d\d\b", sources)))
    assert [code for code, section in zip(codes, sections, strict=True) if "**Do:**" not in section] == []


def test_every_error_class_has_a_code_of_its_own() -> None:
    """No two classes of the tree share a code, and each stands in the tree's drawing."""
    from conveyor import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.ConveyorError)]
    codes = [c.code for c in classes]

    assert len(set(codes)) == len(codes)
    assert [c.__name__ for c in classes if c.__name__ not in (errors.__doc__ or "")] == []


def test_exit_codes_are_the_documented_ones() -> None:
    """docs/reference/cli.md lists exactly the exit codes there are."""
    from conveyor.cli.exit import ExitCode

    page = (HOME / "docs" / "reference" / "cli.md").read_text()
    table = page.split("## Exit codes", 1)[1].split("## ", 1)[0]

    assert [int(number) for number in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)] == [
        int(e) for e in ExitCode
    ]


def test_each_error_ends_with_its_exit_code() -> None:
    """Errors map to exit codes as the page says."""
    from conveyor import errors
    from conveyor.cli.exit import exit_code

    expected = [
        (errors.StoreUnavailable("x"), 3),
        (errors.ConfigurationError("x"), 2),
        (errors.ConfigurationError("x", code="E08"), 4),
        (errors.ConfigurationError("x", code="E09"), 4),
        (errors.ConfigurationError("x", code="E10"), 6),
        (errors.PayloadError("x"), 2),
        (errors.UnknownTask("x"), 5),
        (errors.JobNotFound("x"), 5),
        (errors.QueueNotFound("x"), 5),
        (errors.QueueFull("x"), 6),
        (errors.Duplicate("a", "b"), 6),
        (errors.JobFailed("a", "b", "c", "d"), 7),
        (errors.JobCancelled("x"), 7),
        (errors.ConveyorError("x"), 1),
        (TimeoutError(), 124),
        (ValueError(), 1),
    ]

    assert [(error, int(exit_code(error))) for error, _ in expected] == expected
