"""When schedules are due, beside an independent reading of the rules; and what becomes of instants that come late."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import pytest

from conveyor import ConfigurationError
from conveyor.jobs.schedule import ScheduleSpec, Timing, job_id, late_instants, make_timing

# minute, hour, days of the month, weekdays from Monday; None: all
EXPRESSIONS: dict[str, tuple[set[int], set[int], set[int] | None, set[int] | None]] = {
    "30 2 * * *": ({30}, {2}, None, None),
    "0 3 * * *": ({0}, {3}, None, None),
    "15 1 * * *": ({15}, {1}, None, None),
    "0 0 * * *": ({0}, {0}, None, None),
    "59 23 * * *": ({59}, {23}, None, None),
    "5,35 2,3 * * *": ({5, 35}, {2, 3}, None, None),
    "0 9 * * mon-fri": ({0}, {9}, None, {0, 1, 2, 3, 4}),
    "30 2 * * sun": ({30}, {2}, None, {6}),
    "0 2 1 * *": ({0}, {2}, {1}, None),
    "30 1 28-31 * *": ({30}, {1}, {28, 29, 30, 31}, None),
    "45 0 * * sat": ({45}, {0}, None, {5}),
    "* 2 * * *": (set(range(60)), {2}, None, None),
    "0 * * * *": ({0}, set(range(24)), None, None),
    "*/20 * * * *": ({0, 20, 40}, set(range(24)), None, None),
    "30 */2 * * *": ({30}, set(range(0, 24, 2)), None, None),
    "*/15 1-3 * * *": ({0, 15, 30, 45}, {1, 2, 3}, None, None),
    "* * * * *": (set(range(60)), set(range(24)), None, None),
    "7 */3 * * 0": ({7}, set(range(0, 24, 3)), None, {6}),
    "*/30 0 * * *": ({0, 30}, {0}, None, None),
    "20 2-4 * * *": ({20}, {2, 3, 4}, None, None),
}


def _matches(expression: str, wall: datetime) -> bool:
    minutes, hours, days, weekdays = EXPRESSIONS[expression]
    return (
        wall.minute in minutes
        and wall.hour in hours
        and (days is None or wall.day in days)
        and (weekdays is None or wall.weekday() in weekdays)
    )


def _expected(expression: str, zone: ZoneInfo, begin: datetime, end: datetime) -> list[datetime]:
    """
    Return the instants that Debian's cron has in (begin, end], minute by minute.

    A job with a wildcard in its minutes or hours runs at every minute whose local time fits. Any other runs at the first
    minute with that local time, and at the end of a gap that its time lies in.
    """
    wildcard = any(field.startswith("*") for field in expression.split()[:2])
    found: set[datetime] = set()
    at = begin.replace(second=0, microsecond=0) - timedelta(hours=4)
    previous = at.astimezone(zone).replace(tzinfo=None)
    seen: set[datetime] = set()
    while at < end:
        at += timedelta(minutes=1)
        wall = at.astimezone(zone).replace(tzinfo=None)
        if wildcard:
            if _matches(expression, wall):
                found.add(at)
        else:
            skipped = previous + timedelta(minutes=1)
            while skipped < wall:
                if _matches(expression, skipped):
                    found.add(at)
                skipped += timedelta(minutes=1)
            if _matches(expression, wall) and wall not in seen:
                found.add(at)
            seen.add(wall)
        previous = wall
    return sorted(one for one in found if begin < one <= end)


def _changes(zone: ZoneInfo, year: int) -> list[datetime]:
    """Return the hours before which the clocks of a zone change in a year."""
    at, found = datetime(year, 1, 1, tzinfo=UTC), []
    offset = at.astimezone(zone).utcoffset()
    while at.year == year:
        at += timedelta(hours=1)
        if at.astimezone(zone).utcoffset() != offset:
            offset = at.astimezone(zone).utcoffset()
            found.append(at)
    return found


def _check(names: list[str], expressions: list[str]) -> None:
    for name in names:
        zone = ZoneInfo(name)
        for change in _changes(zone, 2026):
            begin, end = change - timedelta(hours=30), change + timedelta(hours=30)
            for expression in expressions:
                expected = [round(at.timestamp() * 1000) for at in _expected(expression, zone, begin, end)]
                timing = make_timing(expression, tz=name)
                found, ms = [], round(begin.timestamp() * 1000)
                while (at := timing.after(ms)) is not None and at <= end.timestamp() * 1000:
                    found.append(at)
                    ms = at
                assert found == expected, (name, expression, change)


@pytest.mark.row("B4")
@pytest.mark.parametrize(
    "name",
    ["Europe/Berlin", "America/New_York", "Africa/Cairo", "America/Santiago", "Australia/Lord_Howe", "Pacific/Chatham"],
)
def test_the_instants_of_a_clock_change(name: str) -> None:
    """Around both changes of a year each expression is due as Debian's cron is, minute by minute."""
    _check([name], list(EXPRESSIONS))


@pytest.mark.row("B4")
def test_the_instants_of_any_zone(rounds: Any) -> None:
    """The same of zones and expressions that chance picks; the whole of them in the long run."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    dice = random.Random(seed)
    zones = sorted(name for name in available_timezones() if not name.startswith(("posix/", "right/")))
    count = rounds(len(zones), 6)
    _check(dice.sample(zones, count), list(EXPRESSIONS) if count == len(zones) else dice.sample(list(EXPRESSIONS), 6))


def test_an_instant_does_not_depend_on_where_one_looks_from() -> None:
    """From any moment the next instant is the first of the sequence behind it, so that a restart changes nothing."""
    begin = round(datetime(2026, 10, 24, 12, tzinfo=UTC).timestamp() * 1000)
    for timing in (
        make_timing("30 2 * * *", tz="Europe/Berlin"), make_timing("*/20 * * * *", tz="Europe/Berlin"),
        make_timing("*/7 * * * * *"), make_timing(every="45s"), make_timing(every="1h30m"),
    ):  # fmt: skip
        sequence = list(islice(timing.instants(begin), 60))
        assert sequence == sorted(set(sequence))
        for at, following in pairwise(sequence):
            for ms in (at, at + 1, (at + following) // 2, following - 1):
                assert timing.after(ms) == following


@pytest.mark.row("B5")
def test_intervals_and_single_instants() -> None:
    """An interval counts from the epoch; an instant comes once."""
    assert make_timing(every="30s").after(59_999) == 60_000
    assert make_timing(every="30s").after(60_000) == 90_000
    at = datetime(2026, 12, 24, 18, tzinfo=ZoneInfo("Europe/Berlin"))
    once = make_timing(at=at)
    ms = round(at.timestamp() * 1000)
    assert (once.after(ms - 1), once.after(ms)) == (ms, None)
    assert make_timing("0 0 29 2 *").next(2, 0) == [
        datetime(year, 2, 29, tzinfo=ZoneInfo("UTC")) for year in (1972, 1976)
    ]
    assert (
        str(make_timing("0 9 * * mon-fri", tz="Europe/Berlin")) == "At 09:00 on Monday through Friday (Europe/Berlin)"
    )
    assert [str(make_timing(every=one)) for one in ("1s", "30s", 1.5)] == ["every 1 s", "every 30 s", "every 1.5 s"]
    noon = round(datetime(2026, 3, 27, 11, tzinfo=ZoneInfo("UTC")).timestamp() * 1000)
    hourly = (make_timing("0 * * * *", tz="Europe/Berlin"), make_timing(every="1h"))
    for timing in hourly:  # over a change of the clocks
        assert [timing.count(noon, noon + ms) for ms in (-1, 0, 3_599_999, 3_600_000, 72 * 3_600_000)] == [
            0,
            1,
            1,
            2,
            73,
        ]
    assert (once.count(ms, ms), hourly[0].count(0, noon)) == (1, 10_000)
    assert (str(make_timing(every=90)), str(once)) == ("every 1 m 30 s", "at 2026-12-24 17:00:00 UTC")


@pytest.mark.row("B5")
@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({}, "one of cron=, every= and at="),
        ({"cron": "* * * * *", "every": "1m"}, "this one has cron and every"),
        ({"cron": "often"}, "cannot be read"),
        ({"cron": "61 * * * *"}, "cannot be read"),
        ({"cron": "0 0 30 2 *"}, "never comes"),
        ({"cron": "0 0 0 31 4,6 *"}, "never comes"),
        ({"cron": "0 0 32 2 *"}, "cannot be read"),
        ({"cron": "* * * * *", "tz": "Mars/Olympus"}, "not a time zone"),
        ({"cron": "* * * * *", "tz": "../../etc/passwd"}, "not a time zone"),
        ({"every": "1m", "tz": "UTC"}, "belongs to cron="),
        ({"every": "999ms"}, "a second is the least"),
        ({"every": "often"}, "not a duration"),
        ({"at": datetime(2026, 1, 1)}, "time zone"),  # noqa: DTZ001  that is the case
    ],
)
def test_what_never_comes_is_refused(declared: dict[str, Any], message: str) -> None:
    """Expressions, zones and instants that mean nothing are refused where they are written."""
    with pytest.raises(ConfigurationError, match=message):
        make_timing(**declared)


@pytest.mark.row("B6")
def test_instants_that_passed() -> None:
    """Of instants that passed unseen the policy keeps none, the newest, or all; the rest is missed."""
    every = {"every_ms": 60_000}
    passed = [60_000, 120_000, 180_000]
    for now in (180_000, 200_000):
        assert late_instants(ScheduleSpec("t", **every), 60_000, now) == (passed[:2], passed[2:])
        assert late_instants(ScheduleSpec("t", **every, missed="all"), 60_000, now) == ([], passed)
        assert late_instants(ScheduleSpec("t", **every, missed="skip"), 60_000, now) == (passed[:2], passed[2:])
    hourly = ScheduleSpec("t", every_ms=3_600_000, missed="skip")
    assert late_instants(hourly, 3_600_000, 3_660_000) == ([], [3_600_000])
    assert late_instants(hourly, 3_600_000, 3_660_001) == ([3_600_000], [])
    assert late_instants(hourly, 3_600_000, 3_599_999) == ([], [])
    often = ScheduleSpec("t", every_ms=1000)
    missed, come = late_instants(often, 1000, 5_000_000, most=10)
    assert (len(missed), come) == (10, [])
    assert late_instants(ScheduleSpec("t", at_ms=500), 500, 10**9) == ([], [500])


def test_the_id_of_an_instant() -> None:
    """The id of a job is made of its schedule and its instant."""
    at = round(datetime(2026, 11, 28, 9, tzinfo=UTC).timestamp() * 1000)
    assert job_id("report", at) == "report@2026-11-28T09:00:00Z"
    assert job_id("report", at + 250) == "report@2026-11-28T09:00:00.250Z"
    assert Timing(every_ms=1000).after(at - 1) == at
