"""Values that programs and people give by mistake, for the walks over parameters, options, fields and routes."""

from __future__ import annotations

import enum
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

LONG = "x" * 100_000
"""A text that no message may repeat whole."""
LONGEST_ANSWER = 6_000
"""Characters of a message about a wrong value, whatever the value."""
NUMBERS = [
    "0", "-1", "1", "1000000000000000000", "9223372036854775808", "18446744073709551616", f"1{'0' * 30}", "9" * 5000, "1e308", "1e400", "nan",
    "inf", "-inf", "-0", "-0.0", "0.5", "\uff11\uff12", "\u0663", "\xb2", "9\xb2", " 5", "5 ", "1_000", "0x10", "+5", "5\n",
]  # fmt: skip
DURATIONS = [
    "0s", "-5s", "1ms", f"{'9' * 400}s", "100000d", "36601d", "\uff11\uff12s", " 5s", "5 s", "1h1h", "5m5", "1.5.5s", "1e3s"
]  # fmt: skip
TEXTS = [
    "", " ", "\x00", "a\x00b", "\ud800", "a\udcff", "\u202ea", "\x1b[31m", "a\nb", "a\tb", "a:b", "a/b", "a/9", "a/\xb2", "a}b{c", "{}", "..",
    "-", "--", "*", "%s{0}", "null", "None", "true", "[]", '"', "\xe9", "\U0001f600", "/topics", "mail:" + "0" * 22, "mail/999:" + "0" * 22,
    "1-1", "\u0661-\u0661", "500/1m", "1..\xb2", "mail:\xb2", "127.0.0.1:\xb2", "a=b", "q\nready\n\xb2\n", "args.a.\xb2:1", LONG, "[" * 5000,
]  # fmt: skip
INSTANTS = [
    "2026-01-01", "2026-01-01T00:00:00", "2026-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00",
    "2026-13-01T00:00Z",
]  # fmt: skip
ODD_TEXTS = [*NUMBERS, *DURATIONS, *TEXTS, *INSTANTS]
"""Of each kind of mistake one: what may stand where a text is typed or sent."""


class Text(str):
    """A text of a class of its own."""

    __slots__ = ()


class Whole(int):
    """A number of a class of its own."""


class Choice(enum.Enum):
    """An enumeration whose member is neither a text nor a number."""

    ONE = 1


class NoOffset(tzinfo):
    """A time zone that does not say how far it is."""

    def utcoffset(self, _: datetime | None) -> None: ...

    def dst(self, _: datetime | None) -> None: ...

    def tzname(self, _: datetime | None) -> None: ...


def odd_values() -> list[Any]:
    """Return values of every kind that a parameter of a function may be given."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        *ODD_TEXTS, None, True, False, 0, -1, 1, 2, 10**18, 2**53, 2**63, 2**64, 10**30, 10**400, -(10**400), 0.5, -0.0, 1e308, 5e-324,
        float("nan"), float("inf"), float("-inf"), 1j, Whole(3), Text("mail"), Text("5s"), b"", b"mail", b"5s", bytearray(b"x"), now,
        now.replace(tzinfo=None), datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))),
        datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=timezone(timedelta(hours=-14))), datetime.min.replace(tzinfo=UTC),
        now.replace(tzinfo=NoOffset()), timedelta.max, timedelta.min, timedelta(0), timedelta(microseconds=1), timedelta(days=36_599),
        [], [1], ["a"], [""], ["\ud800"], [None], (), ("a", "b"), {}, {"a": "b"}, {1: 2}, {"a": 1}, {"\ud800": "x"}, {"x": LONG},
        {Text("a"): Text("b")}, [Text("a")], set(), {"a"}, range(3), object(), object, int, len, Choice.ONE, Choice, ValueError("x"),
        ValueError, ...,
    ]  # fmt: skip


def shown(value: Any) -> str:
    """Return the beginning of a value, in characters that every terminal has."""
    return ascii(value)[:100]
