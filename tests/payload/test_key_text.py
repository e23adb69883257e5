"""The text of keys: of groups, limits and unique keys."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.key_text import LONGEST_KEY, key_text
from conveyor.payload.signature import TaskSignature


class Colour(Enum):
    RED = "red"


@dataclass
class Order:
    customer: str
    lines: dict[str, int]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("acme", "acme"), (7, "7"), (7.0, "7"), (1.5, "1.5"), (True, "true"), (None, "null"), ("", '""'),
        (Colour.RED, "red"), (date(2026, 1, 2), "2026-01-02"), (Decimal("1.50"), "1.50"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"), (["a", 1], '["a",1]'), ({"b": 1, "a": 2}, '{"a":2,"b":1}'),
        (Order("c", {"y": 1, "x": 2}), '{"customer":"c","lines":{"x":2,"y":1}}'),
    ],
)  # fmt: skip
def test_a_key_reads_as_people_type_it(value: object, text: str) -> None:
    """A scalar is its plain text, anything else its JSON with sorted members."""
    assert key_text(value) == text


def test_a_long_key_keeps_its_beginning_and_differs_by_a_digest() -> None:
    """Keys above 200 characters are shortened to a readable beginning and a digest; different ones stay different."""
    one, other = key_text("order-" * 60 + "1"), key_text("order-" * 60 + "2")
    assert one != other
    assert one[:160] == other[:160] == ("order-" * 60)[:160]
    assert len(one) <= LONGEST_KEY
    assert key_text("x" * 200) == "x" * 200


@pytest.mark.parametrize(
    ("value", "code"), [("a\nb", "E04"), ("\ud800", "E04"), (object(), "E04"), ("g" * 10_240, "E21")]
)
def test_what_cannot_be_a_key_is_refused(value: object, code: str) -> None:
    """Control characters, lone surrogates, values that JSON cannot carry, and 10 KB are refused with what to do."""
    with pytest.raises(PayloadError, match="Nothing was stored") as refused:
        key_text(value, "group")
    assert refused.value.code == code


def signature(function: Any) -> TaskSignature:
    return TaskSignature(function, "send")


def test_an_argument_is_read_however_it_was_given() -> None:
    """The reader finds an argument by position, by name, by its default, and a part of it by a path."""

    def send(
        user: int, tenant: str = "none", *, order: Order | None = None, extra: dict[str, Any] | None = None
    ) -> None: ...

    made = signature(send)
    tenant = made.argument_reader("tenant", "Rate(by)")
    assert (tenant((1, "a"), {}), tenant((1,), {"tenant": "b"}), tenant((1,), {})) == ("a", "b", "none")
    assert made.argument_reader("order.customer", "Rate(by)")((1,), {"order": Order("c", {})}) == "c"
    assert made.argument_reader("extra.region.name", "by")((1,), {"extra": {"region": {"name": "eu"}}}) == "eu"
    with pytest.raises(PayloadError, match=r"Rate\(by\) names 'order.customer', and order=None has no such part"):
        made.argument_reader("order.customer", "Rate(by)")((1,), {})


def test_a_reader_of_no_parameter_is_refused() -> None:
    """A name that is no parameter is refused at import, with the signature and the name that was meant."""

    def send(user: int, tenant: str, *rest: int) -> None: ...

    with pytest.raises(ConfigurationError, match=r"'tenent', which is no argument of send\(\).  Did you mean 'tenant'"):
        signature(send).argument_reader("tenent", "Rate(by)")
    with pytest.raises(ConfigurationError, match="'rest'"):
        signature(send).argument_reader("rest", "Rate(by)")
