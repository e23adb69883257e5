"""
Uniqueness of a task's jobs: `Unique`, `Debounce` and `Throttle` as values, and the keys of a call.

A key is a field of the job: it stands in the first line of its envelope, and what holds it in Redis is released by the step
that ends the job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from conveyor.errors import ConfigurationError
from conveyor.payload.key_text import LARGEST_KEY, call_key
from conveyor.payload.records import JobKey, Life
from conveyor.units import Duration, positive_ms

if TYPE_CHECKING:
    from conveyor.messaging.push_options import Outgoing
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.payload.signature import TaskSignature

Conflict = Literal["keep", "replace", "raise", "rerun"]


@dataclass(frozen=True)
class Unique:
    """
    One job at a time for the same values of the arguments `by` (all arguments when empty).

    The key is held until the job starts, until it is done, or for a duration from its enqueue. `conflict` says what an
    enqueue does that meets a job with the key. ``keep`` stores nothing. ``raise`` raises `Duplicate`. With ``replace`` a job
    that waits gets the new arguments; one that runs with others already is run once more with them afterwards. With
    ``rerun`` one that runs is run once more afterwards in any case, because something has changed; one that waits gets the
    latest arguments.
    """

    by: tuple[str, ...] = ()
    until: Literal["start", "done"] | Duration = "done"
    conflict: Conflict = "keep"
    until_ms: int | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names: object = self.by
        if isinstance(names, str) or not isinstance(names, tuple | list):
            raise ConfigurationError(
                f'Unique(by) takes a tuple of argument names, such as by=("user",), not {names!r}.'
            )
        object.__setattr__(self, "by", _names("Unique(by)", names))
        by_name = isinstance(self.until, str) and self.until in {"start", "done"}
        object.__setattr__(self, "until_ms", None if by_name else positive_ms(self.until, "until"))
        if self.conflict not in ("keep", "replace", "raise", "rerun"):  # a tuple: what is given may have no hash
            raise ConfigurationError(
                f"Unique(conflict) is 'keep', 'replace', 'raise' or 'rerun', not {self.conflict!r}."
            )


@dataclass(frozen=True)
class Debounce:
    """
    Run once, `wait` after the last call with the same `by`, with the arguments of that call; at the latest after `max_wait`.

    `by` is the name of an argument, or a tuple of names; without it all calls of the task are one.
    """

    wait: Duration
    by: str | tuple[str, ...] | None = None
    max_wait: Duration | None = None
    wait_ms: int = field(init=False, repr=False)
    max_wait_ms: int | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _names("Debounce(by)", self.by)
        object.__setattr__(self, "wait_ms", positive_ms(self.wait, "wait"))
        longest = None if self.max_wait is None else positive_ms(self.max_wait, "max_wait")
        object.__setattr__(self, "max_wait_ms", longest)
        if longest is not None and longest < self.wait_ms:
            raise ConfigurationError(
                f"Debounce(max_wait={self.max_wait!r}) is shorter than wait={self.wait!r}. "
                "Make it longer, or leave it out."
            )


@dataclass(frozen=True)
class Throttle:
    """
    Accept the first call with the same `by`, and no other one for `per`.

    `by` is the name of an argument, or a tuple of names; without it all calls of the task are one.
    """

    per: Duration
    by: str | tuple[str, ...] | None = None
    per_ms: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _names("Throttle(by)", self.by)
        object.__setattr__(self, "per_ms", positive_ms(self.per, "per"))


ArgumentReader = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class _Rule:
    """One declaration of a task: the arguments it takes from a call, and what their key does."""

    def __init__(self, what: str, names: Sequence[str] | None, signature: TaskSignature, key: JobKey) -> None:
        self._what, self._key, self._signature = f"The key of {what} of {signature.name}()", key, signature
        self._prefix = f"{what.lower()} {signature.name}" if what != "Unique" else signature.name
        self._all = names is None
        self._readers: list[tuple[str, ArgumentReader]] = [
            (name, signature.argument_reader(name, f"{what}(by)")) for name in names or ()
        ]

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> JobKey:
        """Return the key of a call; raises PayloadError."""
        if self._all:
            given, largest = self._signature.bound(args, kwargs), None
        else:
            given, largest = {name: read(args, kwargs) for name, read in self._readers}, LARGEST_KEY
        return self._key.named(call_key(self._prefix, given, self._what, largest=largest))

    def named(self, key: str) -> JobKey:
        """Return a key that the caller named, with this rule's policy."""
        return self._key.named(key)


class TaskUniqueness:
    """The keys of a task's jobs. `wait_ms` is that of its Debounce, None without one; `raises`: a duplicate is an error."""

    def __init__(
        self, signature: TaskSignature, unique: Unique | None, debounce: Debounce | None, throttle: Throttle | None
    ) -> None:
        """Check the declarations against the parameters; raises ConfigurationError."""
        self.wait_ms = None if debounce is None else debounce.wait_ms
        self.raises = unique is not None and unique.conflict == "raise"
        self._unique: _Rule | None = None
        self._others: list[_Rule] = []
        # The order in which a call is compared: a debounced job takes the latest arguments before anything refuses them.
        if debounce is not None:
            key = JobKey("", "start", conflict="debounce", max_wait_ms=debounce.max_wait_ms)
            self._others.append(_Rule("Debounce", _names("Debounce(by)", debounce.by), signature, key))
        if throttle is not None:
            key = JobKey("", "time", throttle.per_ms)
            self._others.append(_Rule("Throttle", _names("Throttle(by)", throttle.by), signature, key))
        if unique is not None:
            life: Life = "time" if unique.until_ms is not None else "start" if unique.until == "start" else "done"
            key = JobKey("", life, unique.until_ms, unique.conflict)
            self._unique = _Rule("Unique", unique.by or None, signature, key)

    def keys(self, named: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[JobKey, ...]:
        """Return the keys of a call, in the order of their comparison; *named* is the caller's in place of `Unique`'s."""
        keys = [rule.key(args, kwargs) for rule in self._others]
        if self._unique is not None:
            keys.append(self._unique.key(args, kwargs) if named is None else self._unique.named(named))
        elif named is not None:
            keys.append(JobKey(named))
        return tuple(keys)

    def delay(self, outgoing: Outgoing) -> int | None:
        """Return the delay of a call in ms; raises ConfigurationError for times that are Debounce's to say."""
        if self.wait_ms is None:
            return outgoing.delay_ms
        if outgoing.delay_ms is not None or outgoing.at_ms is not None or outgoing.front:
            raise ConfigurationError(
                f"{outgoing.task} has Debounce, which says when its jobs start: leave delay, at and front out. "
                "Nothing was enqueued."
            )
        return self.wait_ms

    def refuse_deferred(self, task: str) -> NoReturn:
        """Raise ConfigurationError for a job that reaches Redis later: nobody could be told of its duplicate."""
        raise ConfigurationError(
            f"{task} has Unique(conflict='raise'), and a job of an outbox reaches Redis later, when nobody is there to be told "
            "of a duplicate. Nothing was enqueued. Declare conflict='keep', 'replace' or 'rerun', or enqueue it outside."
        )


DeclaredUniqueness = tuple[Unique | None, Debounce | None, Throttle | None]


def task_uniqueness(
    signature: TaskSignature, declared: DeclaredUniqueness, sealing: PayloadPipeline | None
) -> TaskUniqueness | None:
    """Return what makes the jobs of a task unique, None when nothing does; raises ConfigurationError."""
    unique, debounce, throttle = declared
    for name, value, kind, example in (
        ("unique", unique, Unique, 'Unique(by=("user",))'),
        ("debounce", debounce, Debounce, 'Debounce("5s", by="page")'),
        ("throttle", throttle, Throttle, 'Throttle("1m", by="user")'),
    ):
        if value is not None and not isinstance(value, kind):
            raise ConfigurationError(f"@app.task({name}=…) takes a {kind.__name__}, such as {example}, not {value!r}.")
    if unique is None and debounce is None and throttle is None:
        return None
    replaces = debounce is not None or (unique is not None and unique.conflict in {"replace", "rerun"})
    if replaces and sealing is not None and sealing.sealer is not None:
        what = "Debounce" if debounce is not None else f"Unique(conflict={unique.conflict!r})"  # type: ignore[union-attr]
        raise ConfigurationError(
            f"{signature.name}: {what} puts new arguments in the place of others, and in an app with keys a seal binds arguments "
            "to the id of their job. Use Unique(conflict='keep') or Throttle, or an app without keys."
        )
    return TaskUniqueness(signature, unique, debounce, throttle)


def _names(what: str, by: object) -> tuple[str, ...]:
    names = () if by is None else (by,) if isinstance(by, str) else tuple(by) if isinstance(by, tuple | list) else None
    if names is None:
        raise ConfigurationError(f"{what} takes the name of an argument, or a tuple of names, not {by!r}.")
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigurationError(f"{what} must be the name of an argument, not {name!r}.")
    return names
