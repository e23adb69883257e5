"""Durations, instants and sizes as people write them, as the milliseconds and bytes that scripts take."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta

from conveyor.errors import ConfigurationError

Duration = float | int | str | timedelta
"""Seconds, a `timedelta`, or a text: ``"250ms"``, ``"5s"``, ``"2m"``, ``"1h30m"``, ``"7d"``."""
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+")
LATEST_MS = 253_402_214_400_000
"""The last day of the year 9999: the last instant that a datetime of every zone can hold."""
LONGEST_MS = 366 * 100 * 86_400_000  # a century; beyond it, numbers lose their milliseconds in Redis


def milliseconds(value: Duration, *, name: str = "duration") -> int:
    """
    Return *value* as whole milliseconds, rounded up so that a short wait does not become none.

    Raises ConfigurationError for unknown text, negative values, NaN and more than a century.
    """
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        seconds = _parse(value, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = _as_float(value)
    else:
        raise ConfigurationError(f"{name} must be seconds, a timedelta or a text such as '5m', not {value!r}.")
    if not math.isfinite(seconds) or seconds < 0 or seconds * 1000 > LONGEST_MS:
        raise ConfigurationError(f"{name} must be between 0 and 100 years, not {value!r}.")
    return math.ceil(round(seconds * 1000, 6))


def positive_ms(value: Duration, name: str) -> int:
    """Return a duration above zero in ms; raises ConfigurationError."""
    ms = milliseconds(value, name=name)
    if ms == 0:
        raise ConfigurationError(f"{name} must be greater than zero, not {value!r}.")
    return ms


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an int that no float holds
        return math.inf


def _parse(text: str, name: str) -> float:
    if not _DURATION.fullmatch(text):
        raise ConfigurationError(
            f"{name} {text!r} is not a duration. Write '250ms', '5s', '2m', '1h30m', '7d', or seconds as a number."
        )
    return sum(float(number) * _UNIT_MS[unit] for number, unit in _DURATION_PART.findall(text)) / 1000


def instant_ms(at: datetime) -> int:
    """
    Return an aware datetime as milliseconds since the epoch; a naive one raises ConfigurationError (E18).

    One behind the last day of the year 9999 becomes that day: a later one could be stored, and not be shown in every zone.
    """
    if not isinstance(at, datetime) or at.utcoffset() is None:
        problem = (
            "needs a time zone" if isinstance(at, datetime) else f"must be a datetime with a time zone, not {at!r}"
        )
        raise ConfigurationError(f"at= {problem}: use datetime.now(UTC) or tzinfo=ZoneInfo(…).", code="E18")
    return min(max(0, math.ceil(at.timestamp() * 1000)), LATEST_MS)


def instant(ms: int) -> datetime:
    """Return a time in ms since the epoch as a datetime; one that no datetime of every zone can hold becomes the latest one."""
    return datetime.fromtimestamp(min(ms, LATEST_MS) / 1000, UTC)


def instant_or_none(ms: int | None) -> datetime | None:
    """Return a time in ms since the epoch as a datetime; None for None and 0."""
    return instant(ms) if ms else None


def span(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    if seconds < 0.01:
        return f"{seconds * 1000:.2g} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller, name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{whole} s"


def rough_span(seconds: float) -> str:
    """Return a length of time in its largest unit, at least a second: ``38 m``."""
    number, unit, *_ = span(max(1.0, round(seconds))).split()
    return f"{number.partition('.')[0]} {unit}"


def rate(per_second: float) -> str:
    """Return a rate, a number a second: ``0.4``, ``12``, ``1,204``."""
    return "0" if per_second == 0 else f"{per_second:.1f}" if per_second < 10 else f"{per_second:,.0f}"


def shortest_text(ms: int) -> str:
    """Return milliseconds as a duration in the largest unit that divides them: ``1m``, ``90s``."""
    unit, size = max(((unit, size) for unit, size in _UNIT_MS.items() if ms % size == 0), key=lambda one: one[1])
    return f"{ms // size}{unit}"


Size = int | str
"""Bytes, or a text: ``"256KiB"``, ``"16MiB"``."""
_SIZE_UNITS = {
    "B": 1,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "kB": 1000,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
}
_SIZE = re.compile(r"(\d{1,12}) ?(B|[KMG]iB|[kKMG]B)")


def size(value: object, name: str) -> int:
    """Return a size in bytes, at least 1; raises ConfigurationError, which calls the value *name*."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[1].strip("0") == "":
        raise ConfigurationError(f"{name} must be a number of bytes or a text such as '256KiB', not {value!r}.")
    return int(match[1]) * _SIZE_UNITS[match[2]]


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return *value* if it is a whole number in a range, both ends included; raises ConfigurationError, which calls it *name*."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        raise ConfigurationError(f"{name} must be a whole number {limits}, not {value!r}.")
    return value


def digits(text: str) -> int | None:
    """Return the number that 1 to 18 ASCII digits write; None for another text, also one that `str.isdigit` calls digits."""
    return int(text) if len(text) <= 18 and text.isascii() and text.isdigit() else None


def iso_timestamp(at: datetime) -> str:
    """Return an instant as ISO 8601 in UTC, with milliseconds."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def quantity(number: int, word: str) -> str:
    """Return ``1 job``, ``1,200 jobs``, ``2 processes``."""
    plural = "es" if word.endswith("s") else "s"
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}{plural}"


def size_text(number: int) -> str:
    """Return a number of bytes in words: ``512 B``, ``83.9 MB``."""
    value = float(number)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def installed_version() -> str:
    """Return the version of the installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("conveyor")
    except PackageNotFoundError:
        return "(not installed)"
