"""Functions and types whose calls and parameters the tests of the payload bind, check and write."""

import inspect
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any

import pydantic


class Color(Enum):
    RED = "r"
    BLUE = "b"


class User(pydantic.BaseModel):
    id: int
    name: str = "ada"


@dataclass
class Order:
    id: str
    total: int


class Worker:
    """The mark of parameters that the worker fills, in these tests: any default of this type."""


def greet(name: str, excited: bool = False) -> str:
    return name + "!" * excited


def plain(a, b=2):
    return a, b


def positional_only(a: int, b: str = "b", /, c: int = 3):
    return a, b, c


def keyword_only(a: int = 1, *, b: str, c: Decimal = Decimal(3)):
    return a, b, c


def variadic(a: int, *rest: date, flag: bool = False, **others: Color):
    return a, rest, flag, others


def only_others(a: int, /, **others: int):
    return a, others


def injected_between(x: int, db: Any = Worker(), y: int = 5, *, context: Any = Worker(), z: int = 6):  # noqa: B008
    return x, db, y, context, z


def is_injected(parameter: inspect.Parameter) -> bool:
    return isinstance(parameter.default, Worker)
