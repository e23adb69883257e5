"""Attempts that ended in the last minutes, hours and days, by the counters that workers write."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from conveyor.admin.server_info import server_time
from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.store.audit_log import marks_key, read_audit
from conveyor.store.inspection import BUCKETS_MS, read_stats
from conveyor.units import instant

if TYPE_CHECKING:
    from conveyor.admin.queue_directory import QueueDirectory
    from conveyor.store.client.client import Client

RANGES: dict[str, tuple[Literal["minutes", "hours"], int]] = {
    "15m": ("minutes", 15), "1h": ("minutes", 60), "6h": ("minutes", 360), "24h": ("minutes", 1440), "7d": ("hours", 168),
    "30d": ("hours", 720),
}  # fmt: skip
SECONDS_OF = {"minutes": 60, "hours": 3600}
_OUTCOMES = ("done", "failed", "retried")
_PERCENTILES = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
_MOST_TASKS = 50
_MOST_SECONDS = 0.08
"""The time in which queue after queue is read, so that an answer takes less than 100 ms."""
_LEAST_QUEUES = 10
"""So many are read however long it takes: on a busy machine the first of them takes all of the time."""
MOST_MARKS = 200


class _Sums(msgspec.Struct):
    """The counters of a time or a task: outcomes, ms of successful runs, and their number by bucket of duration."""

    outcomes: Counter[str] = msgspec.field(default_factory=Counter)
    run_ms: int = 0
    buckets: Counter[int] = msgspec.field(default_factory=Counter)

    def add(self, sums: Mapping[str, int]) -> None:
        for kind, number in sums.items():
            if kind in _OUTCOMES:
                self.outcomes[kind] += number
                if kind == "retried":  # it is counted as failed too
                    self.outcomes["failed"] -= number
            elif kind == "ms":
                self.run_ms += number
            else:
                self.buckets[int(kind[2:])] += number

    def figures(self) -> Mapping[str, float | None]:
        """Return the percentiles and the mean of the duration of successful runs, None each without any."""
        if not self.buckets:  # as of most minutes of a day
            return _NO_FIGURES
        done = sum(self.buckets.values())
        found: dict[str, float | None] = {name: quantile(self.buckets, share) for name, share in _PERCENTILES.items()}
        return {**found, "mean_ms": round(self.run_ms / done, 1) if done else None}


_NO_FIGURES: Mapping[str, float | None] = dict.fromkeys((*_PERCENTILES, "mean_ms"))


class History(msgspec.Struct, frozen=True):
    """
    The attempts that ended in each minute or hour of a range.

    `step`: seconds of each; `times`: when each began, since the epoch. Attempts that were `done`, `failed` (the job is dead) and
    `retried`; percentiles of how long successful ones ran, None where there were none. `tasks`: the sums of each task, those with
    most attempts first. `marks`: what `Admin.mark` noted in the range, the oldest first: `at`, a datetime, and `text`.
    `read_queues` of `queues_total` were read in the time of one call.
    """

    range: str
    step: int
    times: list[int]
    done: list[int]
    failed: list[int]
    retried: list[int]
    p50_ms: list[float | None]
    p95_ms: list[float | None]
    p99_ms: list[float | None]
    mean_ms: list[float | None]
    tasks: list[dict[str, Any]]
    marks: list[dict[str, Any]]
    read_queues: int
    queues_total: int


def read_history(
    client: Client, directory: QueueDirectory, range: str, names: Collection[str] | None, task: str | None,  # noqa: A002
    seconds: float = _MOST_SECONDS,
) -> History:  # fmt: skip
    """Return the history of all queues (None) or some, and of all tasks or one. Raises ConfigurationError and QueueNotFound."""
    if range not in RANGES:
        raise ConfigurationError(f"range must be one of {', '.join(RANGES)}, not {range!r}.")
    unit, count = RANGES[range]
    step = SECONDS_OF[unit]
    last = int(server_time(client)) // step
    first = last - count + 1
    everything = directory.everything()
    if names is not None:
        everything = {name: everything.get(name) or directory.partition_names(name) for name in names}
    times = {number: _Sums() for number in _numbers(first, last)}
    tasks: dict[str, _Sums] = {}
    until, read = time.monotonic() + seconds, 0
    for parts in everything.values():
        for part in parts:
            _read(client, directory, part, unit, (first, last), task, times, tasks)
        read += 1
        if read >= _LEAST_QUEUES and time.monotonic() > until:
            break
    figures = [sums.figures() for sums in times.values()]
    outcomes: dict[str, Any] = {name: [sums.outcomes[name] for sums in times.values()] for name in _OUTCOMES}
    lists: dict[str, Any] = {name: [one[name] for one in figures] for name in (*_PERCENTILES, "mean_ms")}
    return History(
        range, step, [number * step for number in times], **outcomes, **lists, tasks=_tasks(tasks),
        marks=_marks(client, first * step), read_queues=read,
        queues_total=len(everything),
    )  # fmt: skip


def _marks(client: Client, since: int) -> list[dict[str, Any]]:
    """Return the marks since an instant, in seconds since the epoch."""
    rows = client.run(read_audit(marks_key(client.namespace), None, MOST_MARKS, since=since * 1000))
    return [
        {"at": instant(int(row.id.partition("-")[0])), "text": row.fields.get("text", "")} for row in reversed(rows)
    ]


def _numbers(first: int, last: int) -> Iterable[int]:
    return range(first, last + 1)


def _read(
    client: Client, directory: QueueDirectory, part: str, unit: Literal["minutes", "hours"], span: tuple[int, int],
    task: str | None, times: Mapping[int, _Sums], tasks: dict[str, _Sums],
) -> None:  # fmt: skip
    """Add the counters of one queue or partition, unless the server that has it does not answer."""
    at, last = span
    keys = directory.keys(part)
    while at <= last:
        if client.is_away(keys):
            return
        try:
            page = client.run(read_stats(keys, unit, at, last, task))
        except StoreUnavailable:
            if not client.note_away(keys):
                raise
            return
        for number, sums in page.times.items():
            times[number].add(sums)
        for name, sums in page.tasks.items():
            tasks.setdefault(name, _Sums()).add(sums)
        at = max(page.next, at + 1)


def _tasks(found: Mapping[str, _Sums]) -> list[dict[str, Any]]:
    """Return the sums of the tasks of which attempts ended."""
    ended = {name: sums for name, sums in found.items() if sums.outcomes.total()}
    names = sorted(ended, key=lambda name: (-ended[name].outcomes.total(), name))[:_MOST_TASKS]
    return [
        {"task": name, **{kind: ended[name].outcomes[kind] for kind in _OUTCOMES}, **ended[name].figures()}
        for name in names
    ]


def quantile(buckets: Mapping[int, int], share: float) -> float | None:
    """Return a quantile of durations in ms that are counted in buckets, spread evenly in each; None without any."""
    rest = share * sum(buckets.values())
    if not rest:
        return None
    for bucket in sorted(buckets):
        if rest <= buckets[bucket]:
            low = BUCKETS_MS[bucket - 1] if 0 < bucket <= len(BUCKETS_MS) else 0
            high = BUCKETS_MS[bucket] if bucket < len(BUCKETS_MS) else BUCKETS_MS[-1]
            return round(low + (high - low) * rest / buckets[bucket], 1)
        rest -= buckets[bucket]
    return float(BUCKETS_MS[-1])
