"""Limits as values: checked when they are declared, enforced by the queue they are given to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from conveyor.errors import ConfigurationError
from conveyor.units import Duration, positive_ms

SHORTEST_WINDOW_MS = 10
MOST_STARTS_PER_MS = 1000
LARGEST_COUNT = 2**53
"""Numbers of Lua are exact up to it."""
LIMIT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_PATH = re.compile(r"[^\W\d]\w*(\.[\w-]+)*")


@dataclass(frozen=True)
class Rate:
    """
    At most `n` starts in any window of length `per`, exactly, whichever workers start them.

    `by` names what has a rate of its own for every value: an argument of a task (``tenant``, ``order.customer``), a field
    of a message, ``headers.NAME``, or ``group``. `cost` names the argument that says how much one job takes of `n`.
    `smooth` spaces the starts evenly; it takes no `cost`. `name` is what operators call it; tasks of one queue that use the
    same name share it.
    """

    n: int
    per: Duration = field(compare=False)
    by: str | None = None
    cost: str | None = None
    smooth: bool = False
    name: str | None = None
    per_ms: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_count("Rate(n)", self.n)
        check_path("Rate(by)", self.by)
        check_path("Rate(cost)", self.cost)
        _check_limit_name("Rate(name)", self.name)
        if not isinstance(self.smooth, bool):
            raise ConfigurationError(f"Rate(smooth) must be True or False, not {self.smooth!r}.")
        if self.smooth and self.cost is not None:
            raise ConfigurationError(
                f"Rate(cost={self.cost!r}, smooth=True): a smooth rate spaces starts, and cannot weigh them. Declare two limits: "
                f"Rate({self.n:,}, {self.per!r}, cost={self.cost!r}), and a Rate(…, smooth=True) of the number of jobs."
            )
        object.__setattr__(self, "per_ms", positive_ms(self.per, "per"))
        if self.per_ms < SHORTEST_WINDOW_MS or (self.cost is None and self.n >= MOST_STARTS_PER_MS * self.per_ms):
            raise ConfigurationError(
                f"Rate({self.n:,}, {self.per!r}) is finer than a server can count: it has milliseconds. Give a window of at "
                f"least {SHORTEST_WINDOW_MS} ms and fewer than {MOST_STARTS_PER_MS:,} starts a millisecond, such as "
                'Rate(1000, "1s"), or leave the limit out.'
            )

    @property
    def kind(self) -> Literal["rate"]:
        """The word that names this kind."""
        return "rate"


@dataclass(frozen=True)
class Concurrency:
    """
    At most `n` jobs at a time, for every value of `by`, when given; `by` and `name` as in `Rate`.

    With the key of a group it opens the group: `n` of a key at a time instead of one.
    """

    n: int
    by: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        _check_count("Concurrency(n)", self.n)
        check_path("Concurrency(by)", self.by)
        _check_limit_name("Concurrency(name)", self.name)

    @property
    def kind(self) -> Literal["concurrency"]:
        """The word that names this kind."""
        return "concurrency"


def _check_count(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_COUNT:
        raise ConfigurationError(f"{what} must be a whole number of at least 1, not {value!r}.")


def check_path(what: str, value: object) -> None:
    """Raise ConfigurationError for what is no path to an argument or a field; None is no path at all, and allowed."""
    if value is not None and not (isinstance(value, str) and _PATH.fullmatch(value)):
        raise ConfigurationError(
            f'{what} must name an argument, or a part of one, such as "tenant" or "order.customer", not {value!r}.'
        )


def _check_limit_name(what: str, value: object) -> None:
    if value is not None and not (isinstance(value, str) and LIMIT_NAME.fullmatch(value)):
        raise ConfigurationError(f"{what} must be 1 to 128 characters out of A-Z a-z 0-9 _ . - , not {value!r}.")
