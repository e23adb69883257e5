"""Limits as values: checked when they are declared, enforced by the queue they are given to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from conveyor.errors import ConfigurationError
from conveyor.units import Duration, milliseconds


@dataclass(frozen=True)
class Rate:
    """
    At most `n` starts in any window of length `per`.

    `by` names the argument whose every value has a rate of its own, `cost` the argument that says how much one job
    takes of it; `smooth` spaces the starts evenly.
    """

    n: int
    per: Duration
    by: str | None = None
    cost: str | None = None
    smooth: bool = False
    per_ms: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_count("Rate(n)", self.n)
        _check_name("Rate(by)", self.by)
        _check_name("Rate(cost)", self.cost)
        object.__setattr__(self, "per_ms", _positive("per", self.per))


@dataclass(frozen=True)
class Concurrency:
    """At most `n` jobs at a time; with `by`, for every value of that argument."""

    n: int
    by: str | None = None

    def __post_init__(self) -> None:
        _check_count("Concurrency(n)", self.n)
        _check_name("Concurrency(by)", self.by)


@dataclass(frozen=True)
class Unique:
    """
    One job at a time for the same values of the arguments `by` (all of them when empty).

    The key is held until the job starts, until it is done, or for a duration. `conflict` says what a second enqueue
    does: keep the first job, replace its arguments, or raise `Duplicate`.
    """

    by: tuple[str, ...] = ()
    until: Literal["start", "done"] | Duration = "done"
    conflict: Literal["keep", "replace", "raise"] = "keep"

    def __post_init__(self) -> None:
        names: object = self.by
        if isinstance(names, str) or not isinstance(names, tuple | list):
            raise ConfigurationError(
                f'Unique(by) takes a tuple of argument names, such as by=("user",), not {names!r}.'
            )
        object.__setattr__(self, "by", tuple(self.by))
        for name in self.by:
            _check_name("Unique(by)", name)
        if self.until not in {"start", "done"}:
            _positive("until", self.until)
        if self.conflict not in {"keep", "replace", "raise"}:
            raise ConfigurationError(f"Unique(conflict) is 'keep', 'replace' or 'raise', not {self.conflict!r}.")


@dataclass(frozen=True)
class Debounce:
    """Run once, `wait` after the last call with the same `by`, at the latest after `max_wait`."""

    wait: Duration
    by: str | None = None
    max_wait: Duration | None = None
    wait_ms: int = field(init=False, repr=False)
    max_wait_ms: int | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_name("Debounce(by)", self.by)
        object.__setattr__(self, "wait_ms", _positive("wait", self.wait))
        longest = None if self.max_wait is None else _positive("max_wait", self.max_wait)
        object.__setattr__(self, "max_wait_ms", longest)
        if longest is not None and longest < self.wait_ms:
            raise ConfigurationError(
                f"Debounce(max_wait={self.max_wait!r}) is shorter than wait={self.wait!r}. "
                "Make it longer, or leave it out."
            )


def _check_count(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"{what} must be a whole number of at least 1, not {value!r}.")


def _check_name(what: str, value: object) -> None:
    if value is not None and not (isinstance(value, str) and value.isidentifier()):
        raise ConfigurationError(f"{what} must be the name of an argument, not {value!r}.")


def _positive(name: str, value: Duration) -> int:
    ms = milliseconds(value, name=name)
    if ms == 0:
        raise ConfigurationError(f"{name} must be greater than zero, not {value!r}.")
    return ms
