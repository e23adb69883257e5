"""Decides purely what follows an attempt: a retry, or the end. Workers and consumers carry it out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from conveyor.errors import ConfigurationError, RetryIn
from conveyor.payload.records import AttemptHistory
from conveyor.units import Duration, milliseconds

Exceptions = type[BaseException] | tuple[type[BaseException], ...]


@dataclass(frozen=True)
class Retry:
    """
    When and how often a job that failed runs again.

    `attempts` counts the first run too. The pause doubles from `backoff` up to `cap`; `jitter` spreads
    it by ±50 %, so that jobs which failed together do not come back together. Only exceptions of `on`
    are retried, never those of `give_up`. A job whose worker crashed `max_crashes` times while it ran is
    given up as poison.
    """

    attempts: int = 5
    backoff: Duration = "1s"
    cap: Duration = "5m"
    jitter: bool = True
    on: Exceptions = (Exception,)
    give_up: Exceptions = ()
    max_crashes: int = 3
    backoff_ms: int = field(init=False, repr=False)
    cap_ms: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("attempts", self.attempts), ("max_crashes", self.max_crashes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"Retry({name}=…) must be a whole number of at least 1, not {value!r}.")
        for name, types in (("on", self.on), ("give_up", self.give_up)):
            if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in _tuple(types)):
                raise ConfigurationError(
                    f"Retry({name}=…) takes exception classes, such as (ConnectionError,), not {types!r}."
                )
        object.__setattr__(self, "backoff_ms", milliseconds(self.backoff, name="backoff"))
        object.__setattr__(self, "cap_ms", milliseconds(self.cap, name="cap"))

    def pause_ms(self, failures: int, uniform: Callable[[float, float], float] = random.uniform) -> int:
        """Return the pause after so many failures: ``min(cap, backoff × 2^(failures-1))``, with jitter."""
        pause: int = min(self.cap_ms, self.backoff_ms << min(failures - 1, 62))
        return round(pause * uniform(0.5, 1.5)) if self.jitter else pause


def retry_policy(retry: Retry | None, max_attempts: int | None, max_crashes: int | None) -> Retry:
    """Return *retry* (None: the default) with the numbers that are given beside it."""
    numbers: dict[str, Any] = {}
    for name, field_name, number in (
        ("max_attempts", "attempts", max_attempts),
        ("max_crashes", "max_crashes", max_crashes),
    ):
        if number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigurationError(f"{name} must be a whole number of at least 1, not {number!r}.")
        numbers[field_name] = number
    if retry is not None and not isinstance(retry, Retry):
        raise ConfigurationError(f"retry must be a Retry(…), not {retry!r}. A number of attempts is max_attempts=….")
    return replace(retry or Retry(), **numbers)


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Run again after `ms`; `history` is what is stored until then."""

    ms: int
    history: AttemptHistory


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The job becomes a dead letter with this history."""

    history: AttemptHistory
    reason: str


def after_failure(
    policy: Retry,
    history: AttemptHistory,
    attempt: int,
    error: BaseException,
    record: bytes,
    *,
    attempts: int | None = None,
) -> RetryAfter | GiveUp:
    """
    Return what follows a failed attempt: `RetryAfter` or `GiveUp`.

    *history* is as it was leased (before this start), *record* the stored form of the error, *attempts* an
    override of the policy's for this one job.
    """
    budget = policy.attempts if attempts is None else attempts
    failed = AttemptHistory(attempt, history.failures + 1, history.crashes, [*history.errors, record])
    chosen = _chosen_ms(error)
    if chosen is None and (isinstance(error, _tuple(policy.give_up)) or not isinstance(error, _tuple(policy.on))):
        return GiveUp(failed, f"{type(error).__name__} is not retried")
    if failed.failures >= budget:
        return GiveUp(failed, f"all {budget} attempts failed")
    return RetryAfter(policy.pause_ms(failed.failures) if chosen is None else chosen, failed)


def _chosen_ms(error: BaseException) -> int | None:
    if not isinstance(error, RetryIn):
        return None
    try:
        return milliseconds(error.delay, name="RetryIn")
    except ConfigurationError:
        return None  # a failure like any other, whose error shows the delay that is none


def put_off_ms(age_ms: int) -> int | None:
    """Return the ms a job waits for a newer program, when none ran it for *age_ms*; None after a day."""
    if age_ms > 86_400_000:
        return None
    return min(600_000, max(2_000, age_ms))


def handed_back(history: AttemptHistory, attempt: int, *, started: bool) -> AttemptHistory:
    """Return the history of a job given back at a stop: its start counts, its budget is unchanged."""
    return AttemptHistory(attempt if started else history.starts, history.failures, history.crashes, history.errors)


def snoozed(history: AttemptHistory, attempt: int) -> AttemptHistory:
    """Return the history of a job that snoozed: its start counts, its budget is unchanged."""
    return handed_back(history, attempt, started=True)


def with_presumed_crash(history: AttemptHistory, *, alone: bool = False) -> AttemptHistory:
    """
    Return the history written before a suspect starts: one more crash, taken back when it ends in order.

    The crash is marked as presumed. A process that knows more about a death takes it back from jobs that were not
    running, and from a suspect that ran *alone* when another job was being executed.
    """
    return AttemptHistory(history.starts, history.failures, history.crashes + 1, history.errors, "*" if alone else "+")


def runs_alone(history: AttemptHistory, max_crashes: int) -> bool:
    """
    Tell whether a job that came back from crashes must run alone, so that another crash is charged to it only.

    After one crash it runs with the others again, unless the next is its last: whole workers die too, and what
    they held, a thousand jobs perhaps, would come back one by one.
    """
    return history.crashes >= min(2, max_crashes - 1) and history.crashes > 0


def _tuple(types: Exceptions) -> tuple[type[BaseException], ...]:
    return types if isinstance(types, tuple) else (types,)
