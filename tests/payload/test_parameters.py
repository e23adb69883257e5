"""Parameters as text: converted from ``name=text``, and written down for people."""

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import IntEnum
from typing import Annotated
from uuid import UUID

import msgspec
import pytest

from conveyor.errors import PayloadError
from conveyor.payload.signature import TaskSignature
from support.sample_functions import (
    Color,
    Order,
    User,
    greet,
    injected_between,
    is_injected,
    keyword_only,
    only_others,
    plain,
    positional_only,
    variadic,
)


class Level(IntEnum):
    LOW = 1


def texts(
    s: str,
    i: int,
    f: float,
    b: bool,
    color: Color,
    level: Level,
    at: datetime,
    day: date,
    span: timedelta,
    key: UUID,
    price: Decimal,
    numbers: list[int],
    order: Order,
    user: User,
    maybe: int | None,
    word: str | None,
    either: int | str,
    positive: Annotated[int, msgspec.Meta(gt=0)],
    free,
): ...


CONVERSIONS = [
    ("s", "5", "5"),
    ("s", "null", "null"),
    ("i", "-5", -5),
    ("f", "2", 2.0),
    ("f", "1e3", 1000.0),
    ("b", "true", True),
    ("b", "false", False),
    ("b", "0", False),
    ("color", "r", Color.RED),
    ("color", "BLUE", Color.BLUE),
    ("level", "1", Level.LOW),
    ("at", "2026-01-01T09:00:00Z", datetime(2026, 1, 1, 9, tzinfo=UTC)),
    ("day", "2026-01-01", date(2026, 1, 1)),
    ("span", "PT5M", timedelta(minutes=5)),
    ("key", "12345678-1234-5678-1234-567812345678", UUID("12345678-1234-5678-1234-567812345678")),
    ("price", "1.10", Decimal("1.10")),
    ("numbers", "[1, 2]", [1, 2]),
    ("order", '{"id": "o1", "total": 3}', Order("o1", 3)),
    ("user", '{"id": 3}', User(id=3)),
    ("maybe", "7", 7),
    ("maybe", "null", None),
    ("word", "null", "null"),
    ("either", "7", 7),
    ("either", "seven", "seven"),
    ("positive", "3", 3),
    ("free", "3", 3),
    ("free", "[1]", [1]),
    ("free", "hello world", "hello world"),
    ("free", "NaN", "NaN"),
]


@pytest.mark.parametrize(("name", "text", "value"), CONVERSIONS)
def test_text_is_converted_by_the_annotation(name, text, value):
    """``name=text`` becomes the parameter's type; a str stays as it was typed."""
    converted = TaskSignature(texts, "texts").convert_text(name, text)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("i", "five", "i='five' does not fit: Expected int, got str."),
        ("i", "1.5", "i='1.5' does not fit"),
        ("color", "green", "Invalid enum value 'green'"),
        ("numbers", '["a"]', "numbers="),
        ("positive", "-1", "Expected int > 0|Expected int >= 1"),
        ("colour", "r", "unexpected argument 'colour'.  Did you mean 'color'?"),
    ],
)
def test_text_that_does_not_fit_is_refused(name, text, message):
    """Text of another type, or for a parameter that does not exist, is E03."""
    with pytest.raises(PayloadError, match=message.replace("?", r"\?")) as caught:
        TaskSignature(texts, "texts").convert_text(name, text)
    assert caught.value.code == "E03"


def test_text_for_other_keywords_takes_their_annotation():
    """Names that only ``**others`` takes are converted by its annotation, and ``*rest`` has no name."""
    signature = TaskSignature(variadic, "variadic")
    assert signature.convert_text("anything", "b") is Color.BLUE
    with pytest.raises(PayloadError, match="'db', which the worker fills"):
        TaskSignature(injected_between, "task", injected=is_injected).convert_text("db", "1")


def test_a_signature_is_described_as_python_writes_it():
    """The description reads like the definition, whatever the defaults' own repr does."""

    class Broken:
        def __repr__(self):
            raise RuntimeError

    def broken(a=Broken()): ...  # noqa: B008

    for function, text in [
        (greet, "greet(name: str, excited: bool = False) -> str"),
        (plain, "plain(a, b=2)"),
        (positional_only, "positional_only(a: int, b: str = 'b', /, c: int = 3)"),
        (keyword_only, "keyword_only(a: int = 1, *, b: str, c: decimal.Decimal = Decimal('3'))"),
        (only_others, "only_others(a: int, /, **others: int)"),
    ]:
        assert TaskSignature(function, function.__name__).describe() == text
        assert repr(TaskSignature(function, function.__name__)) == f"<Signature {text}>"
    assert TaskSignature(broken, "broken").describe().startswith("broken(a=<Broken")
