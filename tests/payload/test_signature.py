"""The arguments of a call: bound, checked and stored when it is enqueued, decoded when it runs."""

import functools
import inspect
import json
import math
import random
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, TypedDict, Unpack

import msgspec
import pytest

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.codec import MAX_PAYLOAD, ValueCodec
from conveyor.payload.signature import TaskSignature
from support.sample_functions import (
    Color,
    Order,
    User,
    Worker,
    greet,
    injected_between,
    is_injected,
    keyword_only,
    only_others,
    plain,
    positional_only,
    variadic,
)


class Options(TypedDict, total=False):
    speed: int


class Row:
    """Looks like a row of a Django model."""

    pk = 7
    _meta = object()

    def __repr__(self):
        return "<User: ada>"


def unpacked(**options: Unpack[Options]):
    return options


def orders(order: Order, more: list[Order] | None = None, user: User | None = None):
    return order, more, user


CALLS = [
    (greet, ("Ada",), {}, '{"name":"Ada"}'),
    (greet, ("Ada", False), {}, '{"name":"Ada","excited":false}'),
    (greet, (), {"excited": True, "name": "Ada"}, '{"name":"Ada","excited":true}'),
    (plain, (None, [1, {"x": None}]), {}, '{"a":null,"b":[1,{"x":null}]}'),
    (plain, ((1, 2),), {}, '{"a":[1,2]}'),
    (positional_only, (1,), {}, '{"a":1}'),
    (positional_only, (1, "x"), {"c": 4}, '{"a":1,"b":"x","c":4}'),
    (keyword_only, (), {"b": "x"}, '{"b":"x"}'),
    (keyword_only, (5,), {"c": Decimal("1.10"), "b": "x"}, '{"a":5,"b":"x","c":"1.10"}'),
    (variadic, (1,), {}, '{"a":1}'),
    (variadic, (1, date(2026, 1, 1)), {"flag": True, "x": Color.RED},
     '{"a":1,"*":["2026-01-01"],"flag":true,"**":{"x":"r"}}'),
    (variadic, (), {"a": 1, "rest": Color.RED}, '{"a":1,"**":{"rest":"r"}}'),
    (only_others, (1,), {"a": 2}, '{"a":1,"**":{"a":2}}'),
    (unpacked, (), {"speed": 3}, '{"**":{"speed":3}}'),
    (orders, (Order("o1", 5), [Order("o2", 6)]), {"user": User(id=1)},
     '{"order":{"id":"o1","total":5},"more":[{"id":"o2","total":6}],"user":{"id":1,"name":"ada"}}'),
]  # fmt: skip


@pytest.mark.parametrize(("function", "args", "kwargs", "body"), CALLS, ids=range(len(CALLS)))
def test_a_call_arrives_as_it_was_made(function, args, kwargs, body):
    """Calling with what was decoded is calling with what was encoded, and only what was given is stored."""
    signature = TaskSignature(function, "task")
    data = signature.encode(args, kwargs)
    assert json.loads(data) == json.loads(body)
    positional, keyword = signature.decode(data)
    arrived, made = function(*positional, **keyword), function(*args, **kwargs)
    assert arrived == made or repr(arrived) == repr(made).replace("(1, 2)", "[1, 2]")


def test_defaults_are_those_of_the_worker():
    """A default that was not passed is not stored: the function that runs decides, and gets its very object."""
    shared: list[int] = []

    def old(a: int, b: int = 1): ...
    def new(a: int, b: int = 2, c: list[int] = shared): ...

    positional, _ = TaskSignature(new, "new").decode(TaskSignature(old, "old").encode((1,), {}))
    assert positional == [1, 2, []]
    assert positional[2] is shared


def test_injected_parameters_are_left_out():
    """A parameter that the worker fills is neither stored nor accepted, and those behind it go by name."""
    signature = TaskSignature(injected_between, "task", injected=is_injected)
    assert tuple(signature.injected) == ("db", "context")
    assert signature.describe() == "task(x: int, *, y: int = 5, z: int = 6)"
    positional, keyword = signature.decode(signature.encode((1,), {"y": 2}))
    assert injected_between(*positional, **keyword, db="db", context="c") == (1, "db", 2, "c", 6)
    with pytest.raises(PayloadError, match="'db', which the worker fills"):
        signature.encode((1,), {"db": 3})
    with pytest.raises(PayloadError, match=r"takes 1 arguments by position, and 2 were given\. Pass by name: y, z"):
        signature.encode((1, 2), {})
    with pytest.raises(PayloadError, match="unknown field db"):
        signature.decode(b'{"x":1,"db":2}')


def test_a_stored_keyword_cannot_reach_a_parameter_of_its_own():
    """A foreign payload cannot pass a parameter, or what the worker fills, among the other keywords."""

    def task(a: int, *, db: Any = Worker(), **others: Any): ...  # noqa: B008

    signature = TaskSignature(task, "task", injected=is_injected)
    assert signature.decode(b'{"a":1,"**":{"b":2}}') == ([1], {"b": 2})
    for name in ("a", "db"):
        with pytest.raises(PayloadError, match=f"'{name}' is a parameter of its own"):
            signature.decode(json.dumps({"a": 1, "**": {name: 2}}).encode())
    with pytest.raises(PayloadError, match="'db', which the worker fills"):
        signature.encode((1,), {"db": 2})


GREET = "\n    greet(name: str, excited: bool = False) -> str          Nothing was enqueued."

MISTAKES = [
    (greet, (), {"nam": "Ada"}, "greet() got an unexpected argument 'nam'.  Did you mean 'name'?" + GREET),
    (greet, ("Ada",), {"zzz": 1}, "greet() got an unexpected argument 'zzz'." + GREET),
    (greet, (), {}, "greet() is missing 'name'." + GREET),
    (greet, ("a", True, 1), {}, "greet() takes 2 arguments by position, and 3 were given." + GREET),
    (greet, ("a",), {"name": "b"}, "greet() got the argument 'name' twice." + GREET),
    (greet, (1,), {}, "Argument 'name' of greet() does not fit: Expected str, got int (1)." + GREET),
    (greet, (b"a",), {}, "Argument 'name' of greet() does not fit: Expected str, got bytes b'a'." + GREET),
    (greet, ("a",), {"excited": "yes"},
     "Argument 'excited' of greet() does not fit: Expected bool, got str ('yes')." + GREET),
    (positional_only, (), {"a": 1}, "positional_only() takes 'a' by position only."),
    (positional_only, (), {"c": 1}, "positional_only() is missing 'a'."),
    (keyword_only, (1, "x"), {}, "keyword_only() takes 1 arguments by position, and 2 were given. Pass by name: b, c."),
    (keyword_only, (1,), {}, "keyword_only() is missing 'b'."),
    (variadic, (), {}, "variadic() is missing 'a'."),
    (variadic, (1, "soon"), {}, "Argument 'rest' of variadic() does not fit: Invalid RFC3339 encoded date - at $[0]"),
    (variadic, (1,), {"x": "green"}, "Argument 'others' of variadic() does not fit: Invalid enum value 'green'"),
    (orders, (Order("o", "many"),), {},  # type: ignore[arg-type]
     "Argument 'order' of orders() does not fit: Expected int, got str - at $.total"),
    (orders, (Order("o", 1),), {"user": {"id": "x"}}, "Argument 'user' of orders() does not fit: Input should be"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "args", "kwargs", "text"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_wrong_call_says_what_is_wrong_and_how_to_write_it(function, args, kwargs, text):
    """A missing, unexpected or wrong argument is E03: which, why, the signature, and that nothing was enqueued."""
    with pytest.raises(PayloadError) as caught:
        TaskSignature(function, function.__name__).encode(args, kwargs)
    message = str(caught.value)
    assert message.startswith(text)
    assert message.endswith("Nothing was enqueued.")
    assert f"\n    {function.__name__}(" in message
    assert caught.value.code == "E03"


def test_a_model_row_is_refused_with_what_to_pass_instead():
    """A Django object is E04 and the text shows the call to write."""

    def send_invoice(user): ...

    with pytest.raises(PayloadError) as caught:
        TaskSignature(send_invoice, "send_invoice").encode((Row(),), {})
    assert caught.value.code == "E04"
    assert str(caught.value).startswith(
        "Argument 'user' of send_invoice() cannot be stored: <User: ada> is a Django model.\n"
        "    Pass its key and load it in the task:  send_invoice.enqueue(user_id=user.pk)\n"
        "    Storable: str int"
    )


@pytest.mark.parametrize("value", [math.nan, [None, math.inf], {"a": [math.nan]}])
def test_nan_is_refused_also_beside_arguments_that_are_none(value):
    """NaN never becomes null, not even where other arguments are None."""
    signature = TaskSignature(plain, "plain")
    for args, kwargs in [((value,), {}), ((None, value), {}), ((None,), {"b": value})]:
        with pytest.raises(PayloadError, match="NaN") as caught:
            signature.encode(args, kwargs)
        assert caught.value.code == "E04"


def test_what_argument_values_may_be_is_what_any_value_may_be():
    """Rich values need an annotation; sizes and depths count for each argument and for all of them together."""
    signature = TaskSignature(plain, "plain")
    deep: Any = []
    for _ in range(63):
        deep = [deep]
    endless: list[Any] = []
    endless.append(endless)
    for args, code, text in [
        ((datetime.now(UTC),), "E03", "would arrive changed: datetime"),
        ((msgspec.UNSET,), "E04", "UnsetType"),
        ((1, msgspec.UNSET), "E04", "UnsetType"),
        ((10**5000,), "E04", "4300"),
        (("\ud800",), "E04", "Unicode"),
        ((endless,), "E22", "contains itself"),
        ((deep,), "E22", "The call of plain.* deeper than 64"),
        (([deep],), "E22", "Argument 'a'.* deeper than 64"),
        (("x" * MAX_PAYLOAD,), "E21", "Argument 'a' of plain.* takes 524,290 bytes"),
        (("x" * (MAX_PAYLOAD // 2), "x" * (MAX_PAYLOAD // 2)), "E21", "The call of plain.* takes 524,303 bytes"),
    ]:
        with pytest.raises(PayloadError, match=text) as caught:
            signature.encode(args, {})
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        (b'{"name":1}', "E15", r"Expected str, got int - at \$.name"),
        (b'{"nam":"x"}', "E15", "unknown field nam"),
        (b"{}", "E15", "missing required field name"),
        (b"[]", "E15", "Expected object, got array"),
        (b"", "E15", "truncated"),
        (b'{"name":"' + b"x" * MAX_PAYLOAD + b'"}', "E21", "524,299 bytes"),
        (b'{"name":' + b"[" * 5000, "E22", "deeper"),
    ],
    ids=range(7),
)
def test_a_payload_that_does_not_fit_says_where(body, code, text):
    """A payload of another shape of the function is E15, with the path and the function as it is now."""
    with pytest.raises(PayloadError, match=text) as caught:
        TaskSignature(greet, "greet").decode(body)
    assert caught.value.code == code


@pytest.mark.parametrize("function", [greet, variadic, orders])
def test_random_payloads_only_raise_payload_errors(function):
    """2,000 random or mutated payloads decode or raise PayloadError, never anything else."""
    chance = random.Random(4)
    signature = TaskSignature(function, "task")
    samples = [body.encode() for made, _, _, body in CALLS if made is function]
    refused = 0
    for _ in range(2_000):
        data = bytearray(chance.choice([*samples, chance.randbytes(chance.randrange(30))]))
        for _ in range(chance.randrange(4)):
            place = chance.randrange(len(data) + 1)
            data[place : place + chance.randrange(3)] = bytes([chance.choice(b'{}[]":,\\*r1e-\xff\x00')])
        try:
            signature.decode(bytes(data))
        except PayloadError:
            refused += 1
    assert refused > 500


def test_the_result_annotation_is_known():
    """`result` is the annotation, empty when there is none, and `returns_none` tells None apart."""

    def nothing() -> None: ...
    def model() -> "User | None": ...

    assert (TaskSignature(greet, "t").result, TaskSignature(greet, "t").returns_none) == (str, False)
    assert (TaskSignature(plain, "t").result, TaskSignature(plain, "t").returns_none) == (
        inspect.Signature.empty,
        False,
    )
    assert TaskSignature(nothing, "t").returns_none
    codec: ValueCodec[Any] = ValueCodec(TaskSignature(model, "t").result)
    assert codec.decode(codec.encode(User(id=1, name="eve"))) == User(id=1, name="eve")
    assert ValueCodec(TaskSignature(plain, "t").result).encode([1]) == b"[1]"


def test_annotations_resolve_through_wrappers_and_partials():
    """Texts as annotations are looked up where the innermost function was defined."""

    def task(order: "Order", color: "Color" = Color.RED) -> "list[Order]": ...

    @functools.wraps(task)
    def wrapped(*args: Any, **kwargs: Any) -> Any: ...

    for function in (task, wrapped, functools.partial(task)):
        signature = TaskSignature(function, "task")
        assert signature.decode(b'{"order":{"id":"o","total":1}}')[0][0] == Order("o", 1)
        assert signature.result == list[Order]


def test_a_declaration_that_cannot_work_is_refused_at_once():
    """An annotation that does not resolve or cannot be stored raises ConfigurationError that names the parameter."""

    def unknown(a: int, order: "Ordr"): ...  # type: ignore[name-defined]  # noqa: F821
    def unknown_result() -> "Reslt": ...  # type: ignore[name-defined]  # noqa: F821
    def undecided(a: int, b: "list[int] | set[int]"): ...
    def before_rest(a: Any = Worker(), *rest: int): ...  # noqa: B008
    def by_position(a: Any = Worker(), /): ...  # noqa: B008
    def mangled(a: int, __b: int): ...

    for function, text in [
        (unknown, r"(?s)'Ordr' of parameter 'order' does not resolve: .*'Ordr' is not defined.*TYPE_CHECKING"),
        (unknown_result, "'Reslt' of the result does not resolve"),
        (undecided, "Argument 'b' of task.* cannot be stored as"),
        (before_rest, r"before '\*rest'"),
        (by_position, "'a' cannot be filled by name"),
        (mangled, "rename its parameters"),
    ]:
        with pytest.raises(ConfigurationError, match=text):
            TaskSignature(function, "task", injected=is_injected)


def test_an_injected_annotation_need_not_resolve():
    """A parameter that the worker fills is never decoded, so its annotation may exist for type checkers alone."""

    def task(a: int, db: "Database" = Worker()): ...  # type: ignore[name-defined]  # noqa: F821, B008

    assert tuple(TaskSignature(task, "task", injected=is_injected).injected) == ("db",)
