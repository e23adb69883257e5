"""Schedules as values, and when they are due: an expression and an instant give the next instant. No clock is read here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Literal, get_args
from zoneinfo import ZoneInfo

import msgspec
from cronsim import CronSim, CronSimError

from conveyor.errors import ConfigurationError
from conveyor.units import Duration, instant, instant_ms, milliseconds, span

if TYPE_CHECKING:
    from conveyor.jobs.task import TaskCall

Overlap = Literal["skip", "queue", "cancel"]
Missed = Literal["skip", "one", "all"]

ON_TIME_MS = 60_000
"""An instant that is carried out later than that was missed, for `missed="skip"`."""


_FIELDS = ("second", "minute", "hour", "day-of-month", "month", "day-of-week")
"""The fields of an expression, as CronSim calls them in its errors."""


class _CronInstants(CronSim):
    """The instants of an expression, also in zones whose clocks change within an hour or by half of one."""

    def advance_hour(self) -> bool:
        """
        Roll forward to an hour that fits; tell whether it was rolled.

        The form of CronSim goes by 60 minutes. On Lord Howe Island and the Chatham Islands it steps over the change: it misses the
        minutes that come twice, and begins each hour behind the change in its middle. All zones change at a quarter of an hour.
        """
        if self.dt.tzinfo in {None, UTC} or self.dt.hour in self.hours:
            return super().advance_hour()
        self.dt = self.dt.replace(minute=self.dt.minute // 15 * 15, second=0)
        while self.dt.hour not in self.hours:
            self.tick(seconds=900)
            if self.dt.hour == 0 and self.dt.minute == 0:
                break  # another day: the month and the day are looked at again
        return True


class Timing(msgspec.Struct, frozen=True):
    """
    The instants of a schedule: those of a cron expression in a time zone, all multiples of a time, or one instant.

    One of `cron`, `every_ms` and `at_ms` is given. Multiples count from the epoch, so they are the same in every program and after
    every restart: `every="30s"` is due at second 0 and 30 of each minute. A cron expression has five fields, or six of
    which the first is seconds. Where the clocks of a zone change, it follows Debian's cron: a time that does not exist is
    due when the clock jumps, one that exists twice is due once, and hourly and shorter intervals keep their distance.
    """

    cron: str | None = None
    tz: str = "UTC"
    every_ms: int | None = None
    at_ms: int | None = None

    def after(self, ms: int) -> int | None:
        """Return the first instant behind *ms* (both in ms since the epoch); None: there is none any more."""
        if self.every_ms is not None:
            return (ms // self.every_ms + 1) * self.every_ms
        if self.at_ms is not None:
            return self.at_ms if self.at_ms > ms else None
        assert self.cron is not None
        try:
            found = next(_CronInstants(self.cron, datetime.fromtimestamp(ms / 1000, _zone(self.tz))))
        except StopIteration:
            return None
        return round(found.timestamp() * 1000)

    def instants(self, ms: int) -> Iterator[int]:
        """Yield all instants behind *ms*, in order."""
        at = self.after(ms)
        while at is not None:
            yield at
            at = self.after(at)

    def count(self, first: int, last: int, most: int = 10_000) -> int:
        """Return how many instants there are from *first*, which is one, to *last*; those of a cron expression up to *most*."""
        if first > last:
            return 0
        if self.every_ms is not None:
            return (last - first) // self.every_ms + 1
        if self.at_ms is not None:
            return 1
        assert self.cron is not None
        instants = _CronInstants(self.cron, datetime.fromtimestamp(first / 1000, _zone(self.tz)))
        return 1 + sum(1 for _ in takewhile(lambda at: at.timestamp() * 1000 <= last, islice(instants, most - 1)))

    def next(self, count: int, ms: int) -> list[datetime]:
        """Return the next instants behind *ms*, in the zone of the schedule."""
        zone = _zone(self.tz)
        return [datetime.fromtimestamp(at / 1000, zone) for at in islice(self.instants(ms), count)]

    def __str__(self) -> str:
        """Say it in words, such as ``At 09:00 on Monday through Friday (Europe/Berlin)``."""
        if self.every_ms is not None:
            return f"every {_whole_span(self.every_ms)}"
        if self.at_ms is not None:
            return f"at {instant(self.at_ms):%Y-%m-%d %H:%M:%S} UTC"
        assert self.cron is not None
        return f"{CronSim(self.cron, datetime(2000, 1, 1, tzinfo=UTC)).explain()} ({self.tz})"


class ScheduleSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """A schedule as its hash holds it: what is due when, and what an instant does that comes too late or too early. In ms."""

    task: str
    cron: str | None = None
    tz: str = "UTC"
    every_ms: int | None = None
    at_ms: int | None = None
    overlap: Overlap = "skip"
    missed: Missed = "one"
    jitter_ms: int = 0

    @property
    def timing(self) -> Timing:
        """The instants at which it is due."""
        return Timing(self.cron, self.tz, self.every_ms, self.at_ms)


class Declaration(msgspec.Struct, frozen=True):
    """A schedule that code declares beside its task; a worker puts it when it starts."""

    name: str
    call: TaskCall[Any]
    spec: ScheduleSpec


def make_timing(
    cron: str | None = None, *, tz: str | None = None, every: Duration | None = None, at: datetime | None = None
) -> Timing:
    """
    Return the timing that is declared; raises ConfigurationError.

    Refused are none or several of the three, a zone beside anything but `cron`, an expression that cannot be read or that
    never comes, a zone that does not exist, intervals below a second, and an instant without a zone.
    """
    given = [name for name, value in (("cron", cron), ("every", every), ("at", at)) if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise ConfigurationError(f"A schedule has one of cron=, every= and at=; this one has {found}.")
    if tz is not None and cron is None:
        raise ConfigurationError("tz= belongs to cron=: an interval has no zone, and at= has its own.")
    if at is not None:
        return Timing(at_ms=instant_ms(at))
    if every is not None:
        ms = milliseconds(every, name="every")
        if ms < 1000:
            raise ConfigurationError(f"every={every!r} is too short: a second is the least.")
        return Timing(every_ms=ms)
    timing = Timing(cron=cron, tz="UTC" if tz is None else tz)
    if not isinstance(timing.tz, str):
        raise _no_zone(tz)
    _zone(timing.tz)
    try:
        first = next(CronSim(str(cron), datetime(2000, 1, 1, tzinfo=UTC)), None)
    except CronSimError as error:
        if _fits_other_months(str(cron)):
            raise _never(cron) from None
        raise ConfigurationError(
            f"cron={cron!r} cannot be read at column {_column(str(cron), str(error))}: {error}. It has five fields, "
            "minute hour day month weekday, as in '0 9 * * mon-fri', or six with seconds before them."
        ) from None
    if first is None:
        raise _never(cron)
    return timing


def _never(cron: str | None) -> ConfigurationError:
    return ConfigurationError(f"cron={cron!r} never comes: no day fits it. Look at its day and its month.")


def _column(cron: str, error: str) -> int:
    """Return the column, from 1 on, of the field that an error names; of one too many, or the end."""
    at = [found.start() + 1 for found in re.finditer(r"\S+", cron)]
    names = _FIELDS if len(at) == len(_FIELDS) else _FIELDS[1:]
    field = error.removeprefix("Bad ")
    index = names.index(field) if field in names and len(at) == len(names) else len(_FIELDS)
    return at[index] if index < len(at) else len(cron) + 1


def _fits_other_months(cron: str) -> bool:
    """Return whether an expression that was refused would be right in all months, as that of 30 February would."""
    fields = cron.split()
    if len(fields) not in {5, 6}:
        return False
    fields[-2] = "*"
    try:
        CronSim(" ".join(fields), datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError:
        return False
    return True


def make_spec(
    call: TaskCall[Any], timing: Timing, overlap: Overlap, missed: Missed, jitter: Duration | None
) -> ScheduleSpec:
    """Return the specification of a schedule, checked; raises ConfigurationError."""
    if not hasattr(call, "definition"):
        raise ConfigurationError(f"A schedule takes a call, such as report.s(…) of the task report, not {call!r}.")
    for option, value, known in (("overlap", overlap, get_args(Overlap)), ("missed", missed, get_args(Missed))):
        if value not in known:
            raise ConfigurationError(f"{option} must be one of {', '.join(map(repr, known))}, not {value!r}.")
    jitter_ms = 0 if jitter is None else milliseconds(jitter, name="jitter")
    return ScheduleSpec(
        call.definition.name, timing.cron, timing.tz, timing.every_ms, timing.at_ms, overlap, missed, jitter_ms
    )


def job_id(name: str, instant_ms: int) -> str:
    """
    Return the id of the job of an instant, such as ``report@2026-11-28T09:00:00Z``.

    It is no unique key that outlives the job, since a schedule has each instant once: past instants leave no key behind.
    """
    at = datetime.fromtimestamp(instant_ms / 1000, UTC)
    return f"{name}@{at:%Y-%m-%dT%H:%M:%S}{f'.{instant_ms % 1000:03}' if instant_ms % 1000 else ''}Z"


def late_instants(spec: ScheduleSpec, expected_ms: int, now_ms: int, most: int = 1000) -> tuple[list[int], list[int]]:
    """
    Return which instants up to *now_ms* are skipped as missed, and which have a job, each in order.

    *expected_ms* is the instant that the schedule has reached. An instant is missed when the next has come too. The newest
    has its job, but not for `missed="skip"` when it is older than a minute. At most *most* are returned: the rest follows.
    """
    come: list[int] = []
    at: int | None = expected_ms
    while at is not None and at <= now_ms and len(come) < most:
        come.append(at)
        at = spec.timing.after(at)
    if spec.missed == "all" or not come:
        return [], come
    if at is not None and at <= now_ms:
        return come, []  # there are more, and of these none is the newest
    older, newest = come[:-1], come[-1]
    if spec.missed == "skip" and now_ms - newest > ON_TIME_MS:
        return come, []
    return older, [newest]


def _whole_span(ms: int) -> str:
    """Return an interval in words, a whole number of seconds without a fraction."""
    return f"{ms // 1000} s" if ms < 10_000 and ms % 1000 == 0 else span(ms / 1000)


@lru_cache(maxsize=256)
def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except Exception:
        raise _no_zone(name) from None


def _no_zone(name: object) -> ConfigurationError:
    return ConfigurationError(
        f"tz={name!r} is not a time zone that this system knows. Write one such as 'Europe/Berlin' or 'UTC'; where none is "
        "known, install the package tzdata."
    )
