"""Values to JSON and back: nothing changes silently, and every error is a PayloadError."""

import enum
import math
import random
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple, TypedDict
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.codec import MAX_DEPTH, MAX_PAYLOAD, ValueCodec


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mixed(enum.Enum):
    NUMBER = 1
    TEXT = "one"


@dataclass
class Item:
    sku: str
    price: Decimal
    tags: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Order:
    id: UUID
    at: datetime
    items: list[Item]
    note: bytes | None = None


class Point(msgspec.Struct):
    x: float
    y: float | None = None


class ReplicaPair(NamedTuple):
    left: int
    right: str


class Row(TypedDict):
    id: int
    when: date


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    id: int
    at: datetime | None = None
    ratio: float | None = None
    inner: "list[Model]" = []
    camel: int = pydantic.Field(default=0, alias="camelCase")


@dataclass
class Hidden:
    """Equal although one of its fields differs."""

    id: int
    ratio: float | None = field(default=None, compare=False)


class Hostile:
    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__

    def __eq__(self, other):
        raise RuntimeError("no equality")

    def __hash__(self):
        return 1

    @property
    def __class__(self):
        raise RuntimeError("no class")


class Text(str):
    __slots__ = ()

    def __str__(self):
        raise RuntimeError("no str")


class Number(float):
    __slots__ = ()


BERLIN = ZoneInfo("Europe/Berlin")
INSTANT = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC)
ID = UUID("12345678-1234-5678-1234-567812345678")
ORDER = Order(ID, INSTANT, [Item("a", Decimal("1.10"), {"x", "y"}), Item("b", Decimal("1E+3"))], b"\x00\xff")

ROUND_TRIPS = [
    (str, "żółw \x00 \U0001f422"),
    (int, 2**64 - 1),
    (int, -(2**63)),
    (int, 10**30),
    (float, 0.1),
    (float, 1.7976931348623157e308),
    (float, 3),
    (bool, True),
    (None, None),
    (list[int], [1, 2]),
    (tuple[int, ...], (1, 2)),
    (tuple[int, str], (1, "a")),
    (set[int], {1, 2}),
    (frozenset[str], frozenset("ab")),
    (dict[str, int], {"a": 1}),
    (dict[int, Color], {1: Color.RED}),
    (dict[date, list[UUID]], {date(2026, 1, 1): [ID]}),
    (bytes, bytes(range(256))),
    (datetime, INSTANT),
    (datetime, datetime(2026, 1, 1, 12)),  # noqa: DTZ001
    (datetime, datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=BERLIN)),
    (date, date(2026, 2, 28)),
    (time, time(23, 59, 59, 999999)),
    (timedelta, timedelta(days=-3, microseconds=7)),
    (Decimal, Decimal("1.10")),
    (Decimal, Decimal("Infinity")),
    (UUID, ID),
    (Color, Color.BLUE),
    (Level, Level.HIGH),
    (Item, ORDER.items[0]),
    (Point, Point(1.5)),
    (ReplicaPair, ReplicaPair(1, "b")),
    (Row, {"id": 1, "when": date(2026, 1, 1)}),
    (Model, Model(id=1, at=INSTANT, inner=[Model(id=2, camelCase=5)])),
    (list[Model], [Model(id=1), Model(id=2)]),
    (Model | None, None),
    (int | str | None, "5"),
    (Any, {"a": [1, 2.5, None, True, "null", {"b": {}}]}),
    (Any, OrderedDict(Counter("aab"))),
]


@pytest.mark.parametrize(("type_", "value"), ROUND_TRIPS)
def test_a_storable_value_comes_back_equal(type_, value):
    """Every storable type comes back as an equal value of the annotated type."""
    codec: ValueCodec[Any] = ValueCodec(type_)
    back = codec.decode(codec.encode(value))
    if isinstance(value, datetime):  # across zones, the hour that happens twice never equals anything
        assert back.isoformat() == value.isoformat()
    else:
        assert back == value
    assert type(back) is type(value) or type_ is float or isinstance(value, dict)


def test_nested_values_come_back_without_their_own_equality():
    """A dataclass that compares by identity is compared field by field."""
    back = ValueCodec(Order).decode(ValueCodec(Order).encode(ORDER))
    assert (back.id, back.at, back.items, back.note) == (ORDER.id, ORDER.at, ORDER.items, ORDER.note)


def test_the_nearest_json_value_arrives_where_nothing_is_lost():
    """Subclasses of scalars travel by value, whatever they override, and a tuple without annotation as a list."""
    codec: ValueCodec[Any] = ValueCodec(Any)
    assert codec.decode(codec.encode([Text("a"), Number(1.5), Level.LOW])) == ["a", 1.5, 1]
    assert codec.decode(codec.encode({"a": (1, (2,))})) == {"a": [1, [2]]}


def test_plain_values_are_taken_where_the_type_reads_them():
    """A dict may stand for a dataclass, and text for a datetime: the type decides what arrives."""
    for type_, value, data in [
        (Item, {"sku": "a", "price": "1.5"}, b'{"sku":"a","price":"1.5"}'),
        (datetime, "2026-01-01T00:00:00Z", b'"2026-01-01T00:00:00Z"'),
        (set[int], [1, 2, 2], b"[1,2,2]"),
    ]:
        codec: ValueCodec[Any] = ValueCodec(type_)
        assert codec.encode(value) == data


def _chain(depth, leaf=None):
    value = leaf
    for level in range(depth):
        value = {"]}": value} if level % 2 else [value]
    return value


def _endless():
    items: list[Any] = []
    items.append(items)
    return items


NOT_FINITE = [math.nan, math.inf, -math.inf, Number("nan")]

REFUSALS: list[tuple[Any, Any, str, str]] = [
    *[(float, value, "E04", "no NaN") for value in NOT_FINITE],
    *[(Any, {"a": [value]}, "E04", r"\$\.a\[0\]") for value in NOT_FINITE],
    (float | None, math.nan, "E04", "no NaN"),
    (Point, Point(1.0, math.nan), "E04", r"\$\.y"),
    (Hidden, Hidden(1, math.nan), "E04", r"\$\.ratio"),
    (Model, Model(id=1, ratio=math.nan), "E04", r"\$\.ratio"),
    (Any, 10**5000, "E04", "4300 digits"),
    (float, 2**53 + 1, "E03", "would arrive changed: int 9007199254740993 would become float"),
    (Any, "a\ud800", "E04", "not Unicode"),
    (Any, _endless(), "E22", "contains itself"),
    (Any, _chain(MAX_DEPTH + 1), "E22", "deeper than 64"),
    (Any, _chain(500), "E22", "deeper than 64"),
    (Any, "x" * MAX_PAYLOAD, "E21", r"524,290 bytes as JSON, and the limit is 524,288.\n.*pass a reference"),
    (Any, Hostile(), "E04", "of type Hostile"),
    (Any, [{"a": Hostile()}], "E04", "of type Hostile"),
    (Any, {Hostile(): 1}, "E04", "of type Hostile"),
    (Any, {(1, 2): 1}, "E04", "in JSON keys are text"),
    (Any, Hostile, "E04", "of type type"),
    (Any, object(), "E04", "of type object.\n.*\n    Storable: str int"),
    (Any, (x for x in [1]), "E04", "of type generator"),
    (Any, deque([1]), "E04", "of type deque"),
    (Any, {1: "a", "1": "b"}, "E03", "would arrive changed"),
    (Any, {1: "a"}, "E03", r"int 1 would become str '1', at a key of \$"),
    (Any, INSTANT, "E03", "datetime datetime.datetime.* would become str"),
    (Any, [b"a"], "E03", r"bytes b'a' would become str 'YQ==', at \$\[0\]"),
    (Any, {1, 2}, "E03", "set {1, 2} would become list"),
    (Any, Model(id=1), "E03", "Model .* would become dict"),
    (Any, Color.RED, "E03", "would become str 'red'"),
    (str, b"a", "E03", "Expected str, got bytes b'a'"),
    (str, 1, "E03", r"Expected str, got int \(1\)"),
    (int, True, "E03", "Expected int, got bool"),
    (int, 1.5, "E03", "Expected int, got float"),
    (Color, "green", "E03", "Invalid enum value 'green'"),
    (Item, Item("a", "dear"), "E03", r"Invalid decimal string - at \$.price"),  # type: ignore[arg-type]
    (Item, Item(b"a", Decimal(1)), "E03", r"would become str 'YQ==', at \$.sku"),  # type: ignore[arg-type]
    (list[Model], [{"id": "1"}], "E03", r"valid integer - at Model.id - at \$\[0\]"),
    (Order, object(), "E04", "of type object"),
    (datetime, datetime(2026, 1, 1, tzinfo=timezone(timedelta(seconds=3601))), "E03", "would arrive changed"),
]


@pytest.mark.parametrize(("type_", "value", "code", "text"), REFUSALS, ids=range(len(REFUSALS)))
def test_what_would_change_or_break_is_refused_when_stored(type_, value, code, text):
    """A value that cannot arrive as it is raises PayloadError with its code and the reason, and nothing else."""
    with pytest.raises(PayloadError, match=text) as caught:
        ValueCodec(type_, what="message").encode(value)
    assert caught.value.code == code
    assert str(caught.value).startswith("message ")
    assert str(caught.value).endswith("Nothing was stored.")


@pytest.mark.parametrize("nan", NOT_FINITE)
def test_none_beside_nan_does_not_hide_it(nan):
    """NaN is found among values that are null on purpose, and those alone are fine."""
    codec: ValueCodec[Any] = ValueCodec(Any)
    with pytest.raises(PayloadError, match="NaN"):
        codec.encode([None, "null", nan])
    assert codec.decode(codec.encode([None, "null"])) == [None, "null"]


def test_depth_is_counted_exactly():
    """Sixty-four levels pass in both directions and one more does not, however wide; brackets in texts are free."""
    codec: ValueCodec[Any] = ValueCodec(Any)
    wide = [_chain(MAX_DEPTH - 1, '\\"[{') for _ in range(50)]
    assert codec.decode(codec.encode(wide)) == wide
    flat = ['"\\[{' * 100] * 100
    assert codec.decode(codec.encode(flat)) == flat
    for deep in ([*wide, _chain(MAX_DEPTH)], [_chain(MAX_DEPTH), *wide]):
        with pytest.raises(PayloadError, match="deeper"):
            codec.encode(deep)
        with pytest.raises(PayloadError, match="deeper") as caught:
            codec.decode(msgspec.json.encode(deep))
        assert caught.value.code == "E22"


@settings(derandomize=True, max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12), hung=st.booleans())
def test_depth_of_many_chains_is_that_of_the_deepest(lengths, hung):
    """Chains side by side, or hung below each other, are refused exactly when the deepest place is too deep."""
    value: Any = []
    depth = 1
    for length in lengths:
        chain = _chain(length - 1, [])
        if hung:
            value, depth = [value, chain], 1 + max(depth, length)
        else:
            value, depth = [*value, chain], max(depth, 1 + length)
    try:
        ValueCodec(Any).encode(value)
        outcome = "accepted"
    except PayloadError as error:
        outcome = error.code
    assert outcome == ("accepted" if depth <= MAX_DEPTH else "E22")


@pytest.mark.parametrize(
    ("type_", "data", "code", "text"),
    [
        (Item, b'{"sku":1,"price":"1"}', "E15", r"Expected str, got int - at \$.sku"),
        (Item, b'{"sku":"1"}', "E15", "missing required field price"),
        (int, b"", "E15", "truncated"),
        (Any, b'"\xff"', "E15", "utf-8"),
        (Any, b'"\\ud800"', "E15", "cannot be decoded"),
        (Any, b"NaN", "E15", "malformed"),
        (Any, b"1" * 5000, "E15", "out of range"),
        (Any, b"1e999", "E15", "out of range"),
        (Model, b'{"id":"x"}', "E15", "valid integer - at Model.id"),
        (Any, b"[" * 10_000, "E22", "deeper"),
        (Any, b'"' + b"x" * MAX_PAYLOAD + b'"', "E21", "524,290 bytes"),
    ],
    ids=range(11),
)
def test_bytes_that_hold_no_value_are_refused(type_, data, code, text):
    """A document that does not decode into the type raises PayloadError with the place of the error."""
    with pytest.raises(PayloadError, match=text) as caught:
        ValueCodec(type_).decode(data)
    assert caught.value.code == code


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | TEXT
    | st.floats(allow_nan=False, allow_infinity=False)
)
PLAIN = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=30)


@settings(derandomize=True, max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PLAIN)
def test_plain_json_values_come_back_equal(value):
    """Any plain JSON value comes back the same, -0.0 and the kind of each number included."""
    codec: ValueCodec[Any] = ValueCodec(Any)
    assert repr(codec.decode(codec.encode(value))) == repr(value)


@pytest.mark.parametrize("type_", [Any, Order, Model, list[Point]])
def test_random_bytes_only_raise_payload_errors(type_):
    """2,000 random or mutated byte strings decode or raise PayloadError, never anything else."""
    chance = random.Random(15)
    codec: ValueCodec[Any] = ValueCodec(type_)
    samples = [ValueCodec(Order).encode(ORDER), b'{"id":1,"at":"2026-01-01T00:00:00Z"}', b'[{"x":1e5},null]', None]
    refused = 0
    for _ in range(2_000):
        sample = chance.choice(samples)
        data = bytearray(chance.randbytes(chance.randrange(40)) if sample is None else sample)
        for _ in range(chance.randrange(5)):
            place = chance.randrange(len(data) + 1)
            data[place : place + chance.randrange(3)] = bytes([chance.choice(b'{}[]":,\\e-0917tn\xff\xed\x00')])
        try:
            codec.decode(bytes(data))
        except PayloadError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize("type_", [Mixed, list[int] | set[int], int | Model, Item | Point])
def test_a_type_json_cannot_tell_apart_is_refused_when_declared(type_):
    """A type that no JSON could be decoded into for certain raises ConfigurationError at once."""
    with pytest.raises(ConfigurationError, match="order cannot be stored as"):
        ValueCodec(type_, what="order")


def test_lossy_takes_the_json_form_but_never_nan():
    """A result without annotation may arrive as its JSON form; NaN stays refused."""
    codec: ValueCodec[Any] = ValueCodec(Any, lossy=True)
    data = codec.encode({1: (INSTANT, {ID}), "m": Model(id=1)})
    assert codec.decode(data) == {
        "1": ["2026-03-29T01:30:00.123456Z", [str(ID)]],
        "m": {"id": 1, "at": None, "ratio": None, "inner": [], "camelCase": 0},
    }
    with pytest.raises(PayloadError, match="NaN"):
        codec.encode(Point(1.0, math.nan))


def test_the_limit_is_the_callers():
    """`max_payload` bounds both directions, to the byte."""
    codec: ValueCodec[str] = ValueCodec(str, max_payload=10)
    assert codec.decode(codec.encode("x" * 8)) == "x" * 8
    with pytest.raises(PayloadError, match="11 bytes"):
        codec.encode("x" * 9)
    with pytest.raises(PayloadError, match="11 bytes"):
        codec.decode(b'"' + b"x" * 9 + b'"')
