"""Decides purely what follows an attempt: a retry, or the end. Workers and consumers carry it out."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec.structs import replace as replaced

from conveyor.errors import ConfigurationError, RateLimited, RetryIn, Snooze
from conveyor.ids import made_at_ms
from conveyor.payload.records import AttemptHistory
from conveyor.units import Duration, milliseconds, span

Exceptions = type[BaseException] | tuple[type[BaseException], ...]
Backoff = Duration | Sequence[Duration] | Callable[[int, BaseException], Duration]
"""The first pause of a policy that doubles it, all pauses in order, or a function of the attempt that failed and its error."""

_log = logging.getLogger("conveyor.retry")


@dataclass(frozen=True)
class Retry:
    """
    When and how often a job that failed runs again.

    `attempts` counts the first run too. The pause doubles from `backoff` up to `cap`. A list gives the pauses one by one,
    and the last is used again; a function returns the pause for the attempt that failed, from 1, and its error. Neither is
    bounded by `cap`. `jitter` spreads a pause by ±50 %, so that jobs which failed together do not come back together. No attempt
    begins later than `within` after the job was enqueued, or was first due. Only exceptions of `on` are retried, never those of
    `give_up`. A job whose worker crashed `max_crashes` times while it ran is given up as poison.
    """

    attempts: int = 5
    backoff: Backoff = "1s"
    cap: Duration = "5m"
    jitter: bool = True
    on: Exceptions = (Exception,)
    give_up: Exceptions = ()
    max_crashes: int = 3
    within: Duration | None = None
    cap_ms: int = field(init=False, repr=False)
    within_ms: int | None = field(init=False, repr=False)
    _pauses_ms: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("attempts", self.attempts), ("max_crashes", self.max_crashes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"Retry({name}=…) must be a whole number of at least 1, not {value!r}.")
        for name, types in (("on", self.on), ("give_up", self.give_up)):
            if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in _tuple(types)):
                raise ConfigurationError(
                    f"Retry({name}=…) takes exception classes, such as (ConnectionError,), not {types!r}."
                )
        if not isinstance(self.jitter, bool):
            raise ConfigurationError(f"Retry(jitter=…) must be True or False, not {self.jitter!r}.")
        if isinstance(self.backoff, list):
            object.__setattr__(self, "backoff", tuple(self.backoff))
        if isinstance(self.backoff, tuple) and not self.backoff:
            raise ConfigurationError("Retry(backoff=[]) has no pause. Give one at least, such as ['10s', '1m', '1h'].")
        pauses = self.backoff if isinstance(self.backoff, tuple) else () if callable(self.backoff) else (self.backoff,)
        object.__setattr__(self, "_pauses_ms", tuple(milliseconds(pause, name="backoff") for pause in pauses))
        object.__setattr__(self, "cap_ms", milliseconds(self.cap, name="cap"))
        within = None if self.within is None else milliseconds(self.within, name="within")
        if within == 0:
            raise ConfigurationError("Retry(within=…) must be longer than 0. For no second attempt: attempts=1.")
        object.__setattr__(self, "within_ms", within)

    def pause_ms(self, failures: int, error: BaseException | None = None) -> int:
        """
        Return the ms until the next attempt, with jitter, after so many *failures*, the last by *error*.

        A function of `backoff` that raises, or returns no duration, is logged, and the pause is that of a policy without one.
        """
        if callable(self.backoff):
            try:
                pause = milliseconds(self.backoff(failures, error or RuntimeError("refused")), name="backoff")
            except Exception:
                _log.exception("Retry(backoff=%r) failed; the pause doubles from one second", self.backoff)
                pause = min(self.cap_ms, 1000 << min(failures - 1, 62))
        elif isinstance(self.backoff, tuple):
            pause = self._pauses_ms[min(failures, len(self._pauses_ms)) - 1]
        else:
            pause = min(self.cap_ms, self._pauses_ms[0] << min(failures - 1, 62))
        return round(pause * random.uniform(0.5, 1.5)) if self.jitter else pause  # noqa: S311

    @property
    def over_text(self) -> str:
        """The reason of a dead letter for which `is_over` holds."""
        return f"its next attempt would begin later than the {span((self.within_ms or 0) / 1000)} of retry.within allow"

    def is_over(self, start_ms: int, id: str, due_ms: int | None, history: AttemptHistory) -> bool:  # noqa: A002
        """
        Tell whether an attempt at *start_ms* (since the epoch) would begin later than `within` allows.

        The time counts from when *id* was made, or from *due_ms* of a job that was first due later; that of an id of the
        caller's own counts from the oldest error that its *history* keeps.
        """
        if self.within_ms is None:
            return False
        failures = history.failures_list()
        began = max(made_at_ms(id) or (failures[0].at if failures else start_ms), due_ms or 0)
        return start_ms > began + self.within_ms


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
    now_ms: int = 0,
    id: str = "",  # noqa: A002
    due_ms: int | None = None,
) -> RetryAfter | GiveUp:
    """
    Return what follows a failed attempt: `RetryAfter` or `GiveUp`.

    *history* is as it was leased (before this start), *record* the stored form of the error, *attempts* an
    override of the policy's for this one job. *now_ms* (since the epoch), *id* and *due_ms* serve `within`, as in `Retry.is_over`.
    """
    budget = policy.attempts if attempts is None else attempts
    failed = history.with_error(record, starts=attempt, failures=history.failures + 1)
    chosen = wait_of(error) if isinstance(error, RetryIn) else None
    if chosen is None and (isinstance(error, _tuple(policy.give_up)) or not isinstance(error, _tuple(policy.on))):
        return GiveUp(failed, f"{type(error).__name__} is not retried")
    if failed.failures >= budget:
        return GiveUp(failed, f"all {budget} attempts failed")
    pause = policy.pause_ms(failed.failures, error) if chosen is None else chosen
    if policy.is_over(now_ms + pause, id, due_ms, failed):
        return GiveUp(failed, policy.over_text)
    return RetryAfter(pause, failed)


def wait_of(error: RateLimited | RetryIn | Snooze) -> int | None:
    """Return the ms that *error* says to wait; None for what is no duration: a failure like any other, whose error shows it."""
    given: Any = getattr(error, "after" if isinstance(error, RateLimited) else "delay", None)
    try:
        return milliseconds(given, name=type(error).__name__)
    except ConfigurationError:
        return None


def put_off_ms(age_ms: int) -> int | None:
    """Return the ms a job waits for a newer program, when none ran it for *age_ms*; None after a day."""
    if age_ms > 86_400_000:
        return None
    return min(600_000, max(2_000, age_ms))


def handed_back(history: AttemptHistory, attempt: int, *, started: bool) -> AttemptHistory:
    """Return the history of a job given back at a stop: its start counts, its budget is unchanged."""
    return replaced(history, starts=attempt if started else history.starts)


def snoozed(history: AttemptHistory, attempt: int) -> AttemptHistory:
    """Return the history of a job that snoozed: its start counts, its budget is unchanged."""
    return handed_back(history, attempt, started=True)


def with_presumed_crash(history: AttemptHistory, *, alone: bool = False) -> AttemptHistory:
    """
    Return the history written before a suspect starts: one more crash, taken back when it ends in order.

    The crash is marked as presumed. A process that knows more about a death takes it back from jobs that were not
    running, and from a suspect that ran *alone* when another job was being executed.
    """
    return replaced(history, crashes=history.crashes + 1, doubt="*" if alone else "+")


def runs_alone(history: AttemptHistory, max_crashes: int) -> bool:
    """
    Tell whether a job that came back from crashes must run alone, so that another crash is charged to it only.

    After one crash it runs with the others again, unless the next is its last: whole workers die too, and what
    they held, a thousand jobs perhaps, would come back one by one.
    """
    return history.crashes >= min(2, max_crashes - 1) and history.crashes > 0


def _tuple(types: Exceptions) -> tuple[type[BaseException], ...]:
    return types if isinstance(types, tuple) else (types,)
